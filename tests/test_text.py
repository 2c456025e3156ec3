"""The text sources hand out the text, all of it and nothing else."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hlbgpt.data import EmbeddedText
from hlbgpt.data.sources import (
    SPLITS,
    WIKITEXT_NAME,
    WIKITEXT_REVISION,
    HubText,
    TextFiles,
    draw_rows,
    stamps,
)
from hlbgpt.data.token_file import identity
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


def joined(source: TextFiles | HubText | EmbeddedText, split: str) -> str:
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
        TextFiles(folder=str(tmp_path)).path("validation")
    with pytest.raises(InputError, match=r"data\.source\.folder: no folder '.*nowhere'"):
        TextFiles(folder=str(tmp_path / "nowhere")).path("train")
    with pytest.raises(InputError, match=r"data\.source\.test: no file 'gone\.txt'"):
        TextFiles(folder=str(tmp_path), test="gone.txt").path("test")
    with pytest.raises(InputError, match="no text for the train split"):
        TextFiles().path("train")


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
    with pytest.raises(InputError, match=r"no column 'body', only text"):
        joined(HubText(path=str(folder), text_column="body"), "train")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"data\.source: cannot load .*broken: "):
        joined(HubText(path=str(tmp_path / "broken")), "train")
    with pytest.raises(InputError, match=r"data\.source\.path: no folder './nowhere'"):
        HubText(path="./nowhere").fingerprint("train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no parquet files"):
        HubText(path=str(tmp_path / "empty")).fingerprint("train")


def test_hub_fingerprint_pins_the_revision() -> None:
    assert HubText().fingerprint("train") != HubText(revision="main").fingerprint("train")


def test_tokens_of_wikitext_are_found_again() -> None:
    """What was tokenized when name and revision still had WikiText's for defaults."""
    named = "Salesforce/wikitext/wikitext-103-raw-v1@b08601e04326c79dfdd32d625aee71d232d685c3"
    assert identity(HubText(), "train") == f"hlbgpt.data.sources.HubText:hub:{named}:text"


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
def test_splits_that_are_missing_are_drawn(
    tmp_path: Path,
    has_validation: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import hlbgpt.data.sources

    monkeypatch.setattr(hlbgpt.data.sources, "_BLOCK_BYTES", 1000)  # several batches of rows
    write_rows(tmp_path / "hub", "train", {"text": [f"row {i}" for i in range(2000)]})
    if has_validation:
        write_rows(tmp_path / "hub", "val", {"text": ["their own"]})
    source = HubText(path=str(tmp_path / "hub"))
    rows = {split: joined(source, split).split("\n\n")[:-1] for split in SPLITS}
    lines = [line for line in capsys.readouterr().out.splitlines() if "drawn by" in line]
    said = "split: 100 of its 2000 train rows, drawn by their number, are taken for it"
    missing = ["test"] if has_validation else ["validation", "test"]
    assert lines == [f"{tmp_path / 'hub'} has no {split} {said}" for split in missing]
    if has_validation:
        assert rows.pop("validation") == ["their own"]
    drawn = draw_rows(2000)
    for split in missing:
        assert rows[split] == [f"row {i}" for i in drawn[split]]
    every = sorted((row for part in rows.values() for row in part), key=lambda row: int(row[4:]))
    assert every == [f"row {i}" for i in range(2000)]
    for split in missing:
        assert source.size(split) == pytest.approx(source.size("train") / 20, rel=0.01)


@given(st.integers(10, 200_000))
def test_rows_are_drawn_from_everywhere(total: int) -> None:
    drawn = draw_rows(total)
    assert drawn == draw_rows(total)
    number = len(drawn["test"])
    assert len(drawn["validation"]) == number
    assert number <= max(total // 10, 100)
    assert min(total // 10, 100) <= number <= 1000
    both = sorted([*drawn["validation"], *drawn["test"]])
    assert len(set(both)) == 2 * number
    assert both[0] >= 0
    assert both[-1] < total
    every = total // number
    for rows in drawn.values():
        assert [row // every for row in rows] == list(range(number))
    assert number < 100 or len({row % every for row in drawn["test"]}) > min(every, 10) // 2


@pytest.mark.usefixtures("hub_cache")
def test_splits_that_cannot_be_drawn_are_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "few", "train", {"text": ["a"] * 9, "id": [1] * 9})
    with pytest.raises(InputError, match="9 train rows are too few to take validation and test"):
        joined(HubText(path=str(tmp_path / "few")), "train")
    with pytest.raises(InputError, match=r"'id' of .*few holds int64, no text; the columns are "):
        joined(HubText(path=str(tmp_path / "few"), text_column="id"), "train")
    with pytest.raises(InputError, match="has no validation split, only train; use another"):
        joined(HubText(path=str(tmp_path / "few"), rows="lines"), "validation")
    write_rows(tmp_path / "none", "test", {"text": ["a"] * 9})
    with pytest.raises(InputError, match="none has no train split, only test; use another"):
        joined(HubText(path=str(tmp_path / "none")), "validation")


def test_stamps_of_many_files_fit_into_a_header(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.parquet" for i in range(100)]
    for path in paths:
        path.write_text("x")
    before = stamps(paths)
    assert len(before) == 64
    paths[50].write_text("xx")
    assert stamps(paths) != before
    assert str(paths[0]) in stamps(paths[:3])


def test_embedded_text_is_documentation_and_imports_none_of_it() -> None:
    code = (
        "import sys\n"
        "from hlbgpt.data import EmbeddedText\n"
        "from hlbgpt.data.sources import SPLITS\n"
        "source = EmbeddedText()\n"
        "text = {split: ''.join(source.chunks(split)) for split in SPLITS}\n"
        "assert 'turtle' not in sys.modules and 'antigravity' not in sys.modules\n"
        "assert 'datasets' not in sys.modules\n"
        "assert 'Turtle graphics is a popular way' in ''.join(text.values())\n"
        "assert 'def ' not in text['train'][:100]\n"
        "sizes = {split: len(part.encode()) for split, part in text.items()}\n"
        "assert sizes == {split: source.size(split) for split in SPLITS}, sizes\n"
        "assert sizes['train'] > 1_000_000 and min(sizes.values()) > 20_000, sizes\n"
        "titles = [set(part.split('\\n\\n')) for part in text.values()]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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


def test_offline_from_what_was_prepared(tmp_path: Path) -> None:
    """HF_DATASETS_OFFLINE=1: the data sets' own cache is enough, in the layout of a download."""
    text = " \n = Title = \n \n Some text , with é . \n"
    cache = tmp_path / "cache"
    folder = write_hub_layout(tmp_path / "hub", dict.fromkeys(SPLITS, text)) / WIKITEXT_NAME
    names = {"name": "Salesforce/wikitext", "config": WIKITEXT_NAME, "revision": WIKITEXT_REVISION}
    write_hub_cache(cache, folder, **names)
    write_rows(tmp_path / "other", "train", {"text": ["document"] * 20})
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
    assert "anyone/stories has no test split: 2 of its 20 train rows, drawn" in said[1]


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
