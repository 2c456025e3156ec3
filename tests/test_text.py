"""The text sources hand out the text, all of it and nothing else."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hlbgpt.data import HubText, PythonDocs, TextFiles, TextSource
from hlbgpt.data.hub import WIKITEXT_NAME, WIKITEXT_REVISION
from hlbgpt.data.sources import SPLITS, file_stamps
from hlbgpt.utils.errors import InputError


def write_hub_layout(folder: Path, texts: dict[str, str]) -> Path:
    """WikiText's parquet files as on the hub: a row a line, a blank line an empty row."""
    for split, text in texts.items():
        lines = text.splitlines(keepends=True)
        rows = ["" if line == " \n" else line for line in lines]
        write_rows(folder / WIKITEXT_NAME, split, {"text": rows})
    return folder


def write_rows(folder: Path, split: str, columns: dict[str, list]) -> None:
    import datasets

    path = folder / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(str(path))


def joined(source: TextSource, split: str) -> str:
    return "".join(source.chunks(split))


def test_files_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hlbgpt.data.sources

    monkeypatch.setattr(hlbgpt.data.sources, "_BLOCK_BYTES", 3)  # cuts characters in two
    text = "é漢𝄞\r\n \n\x01 end without a line feed"
    (tmp_path / "wiki.train.tokens").write_bytes(text.encode())
    (tmp_path / "mine.txt").write_bytes(text.encode() * 2)
    source = TextFiles(folder=str(tmp_path), test=str(tmp_path / "mine.txt"))
    assert joined(source, "train") == text
    assert joined(source, "test") == text * 2
    assert source.size("train") == len(text.encode())


def test_fingerprint_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "wiki.train.raw"
    path.write_text("one")
    source = TextFiles(folder=str(tmp_path))
    before = source.fingerprint("train")
    assert source.fingerprint("train") == before
    path.write_text("other")
    assert source.fingerprint("train") != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good \xff bad", r"wiki\.train\.raw: not UTF-8 text at byte 5 "),
        (b"a" * 9 + "é".encode()[:1], "not UTF-8 text at byte 9 "),
    ],
)
def test_text_that_is_not_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    import hlbgpt.data.sources

    monkeypatch.setattr(hlbgpt.data.sources, "_BLOCK_BYTES", 4)
    (tmp_path / "wiki.train.raw").write_bytes(content)
    with pytest.raises(InputError, match=message):
        joined(TextFiles(folder=str(tmp_path)), "train")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no wiki\.valid\.raw or wiki\.valid\.tokens"):
        TextFiles(folder=str(tmp_path)).paths("validation")
    with pytest.raises(InputError, match=r"no wiki\.train\.raw .* in '.*nowhere'; add it"):
        TextFiles(folder=str(tmp_path / "nowhere")).paths("train")
    with pytest.raises(InputError, match=r"data\.source\.test: no file 'gone\.txt'"):
        TextFiles(folder=str(tmp_path), test="gone.txt").paths("test")
    with pytest.raises(InputError, match="no text for the train split"):
        TextFiles().paths("train")


@pytest.mark.usefixtures("hub_cache")
def test_hub_layout_gives_the_raw_file_byte_for_byte(tmp_path: Path) -> None:
    text = " \n = Title = \n \n Some text , with é . \n \n \n = = Part = = \n"
    folder = write_hub_layout(tmp_path / "hub", dict.fromkeys(SPLITS, text))
    source = HubText(path=str(folder))
    for split in SPLITS:
        assert joined(source, split) == text


@pytest.mark.usefixtures("hub_cache")
def test_hub_layout_gives_wikitext_byte_for_byte(tmp_path: Path, test_data: Path) -> None:
    text = (test_data / "wikitext" / "wiki.test.raw").read_bytes().decode()
    folder = write_hub_layout(tmp_path / "hub", {"test": text})
    assert joined(HubText(path=str(folder)), "test") == text


@pytest.mark.usefixtures("hub_cache")
def test_hub_layout_mistakes_are_named(tmp_path: Path) -> None:
    folder = write_hub_layout(tmp_path / "hub", {"train": "words \n"})
    with pytest.raises(InputError, match=r"has no test split, only train; use"):
        joined(HubText(path=str(folder)), "test")
    with pytest.raises(InputError, match=r"no text column 'body'; its columns are text \(string\)"):
        joined(HubText(path=str(folder), text_column="body"), "train")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"data\.source: cannot load .*broken: "):
        joined(HubText(path=str(tmp_path / "broken")), "train")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(InputError, match=rf"data\.source: cannot load {folder}: "):
            joined(HubText(path=str(folder)), "train")


def test_hub_fingerprint_pins_the_revision() -> None:
    assert HubText().fingerprint("train") != HubText(revision="main").fingerprint("train")


def test_the_path_of_a_data_set_is_enough() -> None:
    source = HubText(path="roneneldan/TinyStories")
    assert (source.name, source.revision) == (None, None)
    seen = {
        HubText(path="roneneldan/TinyStories", **more).fingerprint("train")
        for more in ({}, {"name": "a"}, {"revision": "a"}, {"text_column": "a"}, {"rows": "lines"})
    }
    assert len(seen) == 5


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev"])
def test_rows_of_other_data_sets_are_documents(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["One\n\ndocument.\n", "", None, " Another", "\n", "a third\n\n"]
    for split in ("train", name, "test"):
        write_rows(tmp_path / "hub", split, {"id": list(range(6)), "body": rows})
    source = HubText(path=str(tmp_path / "hub"), text_column="body")
    for split in SPLITS:
        assert joined(source, split) == "One\n\ndocument.\n\n Another\n\na third\n\n"
    lines = HubText(path=str(tmp_path / "hub"), text_column="body", rows="lines")
    assert joined(lines, "test") == "One\n\ndocument.\n \n \n Another\na third\n\n"
    assert lines.fingerprint("train") != source.fingerprint("train")
    assert "no validation split" not in capsys.readouterr().out


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("has_validation", [True, False])
def test_missing_splits_are_drawn_from_the_train_rows(
    tmp_path: Path, has_validation: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "hub", "train", {"text": [f"row {i}" for i in range(2000)]})
    if has_validation:
        write_rows(tmp_path / "hub", "val", {"text": ["their own"]})
    source = HubText(path=str(tmp_path / "hub"))
    rows = {split: joined(source, split).split("\n\n")[:-1] for split in SPLITS}
    lines = [line for line in capsys.readouterr().out.splitlines() if "instead" in line]
    said = "split: 100 of its 2000 train rows are used instead"
    missing = ["test"] if has_validation else ["validation", "test"]
    assert lines == [f"{tmp_path / 'hub'} has no {split} {said}" for split in missing]
    if has_validation:
        assert rows.pop("validation") == ["their own"]
    for split in missing:
        place = {"validation": 18, "test": 19}[split]
        assert rows[split] == [f"row {i}" for i in range(place, 2000, 20)]
    every = sorted((row for part in rows.values() for row in part), key=lambda row: int(row[4:]))
    assert every == [f"row {i}" for i in range(2000)]
    for split in missing:
        assert source.size(split) == pytest.approx(
            source.size("train") / (20 - len(missing)), rel=0.01
        )


@pytest.mark.usefixtures("hub_cache")
def test_a_thousand_rows_of_a_large_data_set_are_enough(tmp_path: Path) -> None:
    write_rows(tmp_path / "hub", "train", {"text": [str(i) for i in range(50_000)]})
    source = HubText(path=str(tmp_path / "hub"))
    assert joined(source, "test").split() == [str(i) for i in range(49, 50_000, 50)]
    assert len(joined(source, "train").split()) == 48_000


@pytest.mark.usefixtures("hub_cache")
def test_splits_and_columns_that_do_not_exist_are_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "few", "train", {"text": ["a"] * 9, "id": [1] * 9})
    with pytest.raises(InputError, match=r"text column 'id'; its columns are .*id \(int64\)"):
        joined(HubText(path=str(tmp_path / "few"), text_column="id"), "train")
    with pytest.raises(InputError, match="has no validation split, only train; use another"):
        joined(HubText(path=str(tmp_path / "few"), rows="lines"), "validation")
    write_rows(tmp_path / "none", "test", {"text": ["a"] * 9})
    with pytest.raises(InputError, match="none has no validation split, only test; use another"):
        joined(HubText(path=str(tmp_path / "none")), "validation")


def test_stamps_follow_every_file(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.parquet" for i in range(100)]
    for path in paths:
        path.write_text("x")
    before = file_stamps(paths)
    assert file_stamps(paths) == before
    paths[50].write_text("xx")
    assert file_stamps(paths) != before
    assert file_stamps(paths[1:]) != file_stamps(paths[:-1])


def test_python_docs_are_documentation_and_import_none_of_it() -> None:
    before = set(sys.modules)
    source = PythonDocs()
    text = {split: "".join(source.chunks(split)) for split in SPLITS}
    assert not {"turtle", "antigravity", "datasets"} & (set(sys.modules) - before)
    assert not {"turtle", "antigravity"} & before, "nothing could be seen"
    assert "Turtle graphics is a popular way" in "".join(text.values())
    assert "def " not in text["train"][:100]
    sizes = {split: len(part.encode()) for split, part in text.items()}
    assert sizes == {split: source.size(split) for split in SPLITS}
    assert sizes["train"] > 1_000_000
    assert min(sizes.values()) > 20_000


def write_hub_cache(cache: Path, folder: Path, *, name: str, config: str, revision: str) -> None:
    """What a download of `name` leaves in a cache, made from the parquet files of `folder`."""
    import datasets

    made = cache.with_name(f"made {config}")
    datasets.load_dataset(str(folder), cache_dir=str(made))
    (info_file,) = made.glob("*/*/*/*/dataset_info.json")
    # The hub's data set differs from a local folder's in its names.
    owner, plain = name.split("/")
    there = cache / f"{owner}___{plain}" / config / "0.0.0" / revision
    shutil.copytree(info_file.parent, there)
    for file in there.glob("*.arrow"):
        file.rename(there / f"{plain}-{file.stem.rpartition('-')[2]}.arrow")
    info = json.loads((there / "dataset_info.json").read_text())
    info |= {"dataset_name": plain, "config_name": config}
    (there / "dataset_info.json").write_text(json.dumps(info))


@pytest.mark.slow
def test_offline_from_what_was_prepared(tmp_path: Path) -> None:
    """HF_DATASETS_OFFLINE=1: the data sets' own cache is enough, in the layout of a download."""
    text = " \n = Title = \n \n Some text , with é . \n"
    cache = tmp_path / "cache"
    folder = write_hub_layout(tmp_path / "hub", dict.fromkeys(SPLITS, text)) / WIKITEXT_NAME
    names = {"name": "Salesforce/wikitext", "config": WIKITEXT_NAME, "revision": WIKITEXT_REVISION}
    write_hub_cache(cache, folder, **names)
    write_rows(tmp_path / "other", "train", {"text": ["document"] * 40})
    names = {"name": "anyone/stories", "config": "default", "revision": "abc"}
    write_hub_cache(cache, tmp_path / "other", **names)
    code = (
        "from hlbgpt.data import HubText\n"
        "print(repr(''.join(HubText().chunks('validation'))))\n"
        "print(repr(''.join(HubText('anyone/stories').chunks('test'))))"
    )
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    wikitext, *said, documents = done.stdout.splitlines()
    assert ast.literal_eval(wikitext) == text
    assert ast.literal_eval(documents) == "document\n\n" * 2
    assert "anyone/stories has no test split: 2 of its 40 train rows are used" in said[1]


@pytest.mark.slow
def test_offline_without_anything_prepared_is_one_line(tmp_path: Path) -> None:
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path)}
    code = "from hlbgpt.data import HubText; list(HubText().chunks('train'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
    )
    assert done.stderr.splitlines()[-1].startswith(
        "hlbgpt.utils.errors.InputError: data.source: cannot"
    )
