"""The text sources hand out the text, all of it and nothing else."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hlbgpt.data.text import SPLITS, WIKITEXT_REVISION, EmbeddedText, HubText, TextFiles
from hlbgpt.errors import InputError


def write_hub_layout(folder: Path, texts: dict[str, str]) -> Path:
    """Parquet files as on the hub: a row a line, a blank line an empty row."""
    import datasets

    for split, text in texts.items():
        lines = text.splitlines(keepends=True)
        rows = ["" if line == " \n" else line for line in lines]
        path = folder / "wikitext-103-raw-v1" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({"text": rows}).to_parquet(str(path))
    return folder


def joined(source: TextFiles | HubText | EmbeddedText, split: str) -> str:
    return "".join(source.chunks(split))


def test_files_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hlbgpt.data.text

    monkeypatch.setattr(hlbgpt.data.text, "_BLOCK_BYTES", 3)  # cuts characters in two
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
    import hlbgpt.data.text

    monkeypatch.setattr(hlbgpt.data.text, "_BLOCK_BYTES", 4)
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
    with pytest.raises(InputError, match=r"cannot load split 'test'"):
        joined(HubText(path=str(folder)), "test")
    with pytest.raises(InputError, match=r"no column 'body', only text"):
        joined(HubText(path=str(folder), text_column="body"), "train")
    with pytest.raises(InputError, match=r"data\.source\.path: no folder './nowhere'"):
        HubText(path="./nowhere").fingerprint("train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no parquet files"):
        HubText(path=str(tmp_path / "empty")).fingerprint("train")


def test_hub_fingerprint_pins_the_revision() -> None:
    assert HubText().fingerprint("train") != HubText(revision="main").fingerprint("train")


def test_embedded_text_is_documentation_and_imports_none_of_it() -> None:
    code = (
        "import sys\n"
        "from hlbgpt.data.text import EmbeddedText, SPLITS\n"
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


def test_offline_from_what_was_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_DATASETS_OFFLINE=1: the data set's own cache is enough, in the layout of a download."""
    import datasets

    text = " \n = Title = \n \n Some text , with é . \n"
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "made")
    folder = write_hub_layout(tmp_path / "hub", dict.fromkeys(SPLITS, text))
    datasets.load_dataset(str(folder / "wikitext-103-raw-v1"))
    (made,) = (tmp_path / "made").glob("*/*/*/*/dataset_info.json")
    # What a download of the hub's data set leaves differs from a local folder's in its names.
    there = cache / "Salesforce___wikitext" / "wikitext-103-raw-v1" / "0.0.0" / WIKITEXT_REVISION
    shutil.copytree(made.parent, there)
    for file in there.glob("*.arrow"):
        file.rename(there / f"wikitext-{file.stem.rpartition('-')[2]}.arrow")
    info = json.loads((there / "dataset_info.json").read_text())
    info |= {"dataset_name": "wikitext", "config_name": "wikitext-103-raw-v1"}
    (there / "dataset_info.json").write_text(json.dumps(info))
    code = (
        "from hlbgpt.data import HubText; "
        "print(''.join(HubText().chunks('validation')).encode(), end='')"
    )
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == text.encode()


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
    assert done.stderr.splitlines()[-1].startswith("hlbgpt.errors.InputError: data.source: cannot")
