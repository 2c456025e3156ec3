"""A folder of texts becomes three splits, which are the same every time."""

import json
from pathlib import Path

import pytest
from conftest import QUICKSTART
from hypothesis import given
from hypothesis import strategies as st

import hlbgpt.data.sources
from hlbgpt.data import TextFolder
from hlbgpt.data.sources import SPLITS
from hlbgpt.data.text_folder import cut
from hlbgpt.utils.errors import InputError


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def lines(number: int, mark: str = "") -> str:
    """So many different lines of some 20 characters."""
    return "".join(f"{mark}, é, line {i:06}\n" for i in range(number))


def splits(folder: Path) -> dict[str, str]:
    source = TextFolder(str(folder))
    return {split: "".join(source.chunks(split)) for split in SPLITS}


@given(
    st.text("ab \n", min_size=1, max_size=400).map(lambda text: text * 5),
    st.lists(st.integers(1, 300)),
    st.integers(1, 20),
)
def test_blocks_are_the_text_however_it_comes(text: str, sizes: list[int], block: int) -> None:
    def pieces():
        start = 0
        for size in sizes:
            yield text[start : start + size]
            start += size
        yield text[start:]

    blocks = list(cut(pieces(), block))
    assert blocks == list(cut(iter([text]), block))
    *first, last = blocks
    assert all(block < len(part) <= 2 * block for part in first)
    rest = text.removeprefix("".join(first))
    assert 0 < len(rest) <= 2 * block
    assert last == rest.rstrip("\n") + "\n\n"


def test_blocks_end_with_paragraphs_or_else_lines_or_words() -> None:
    for mark in ("\n\n", "\n", " "):
        text = ("x" * 17 + mark) * 20
        assert all(part.endswith(mark) for part in [*cut(iter([text]), 40)][:-1])
    assert {len(part) for part in cut(iter(["x" * 800]), 40)} == {80, 82}


@pytest.mark.parametrize("names", [1, 300], ids=["one large file", "many small ones"])
@pytest.mark.parametrize("count", [6_000, 200_000])
def test_every_line_is_in_one_split(tmp_path: Path, names: int, count: int) -> None:
    for i in range(names):
        write(tmp_path, f"{i % 7}/{i}.txt", lines(count // names, f"f{i}"))
    texts = splits(tmp_path)
    every = [line for text in texts.values() for line in text.split("\n") if line]
    assert len(every) == len(set(every)) == count // names * names
    shares = {split: len(text) / sum(map(len, texts.values())) for split, text in texts.items()}
    assert shares == {
        "train": pytest.approx(0.9, abs=0.03),
        "validation": pytest.approx(0.05, abs=0.02),
        "test": pytest.approx(0.05, abs=0.02),
    }
    source = TextFolder(str(tmp_path))
    for split, text in texts.items():
        assert source.size(split) == pytest.approx(len(text.encode()), rel=0.5)


def test_the_19th_and_20th_of_every_20_blocks_are_held_out(tmp_path: Path) -> None:
    for i in range(45):  # each a block, in the order of names
        write(tmp_path, f"{i:02}.txt", f"document {i}" + "\n" * (i % 4))
    wanted: dict[str, str] = dict.fromkeys(SPLITS, "")
    for i in range(45):
        split = {18: "validation", 19: "test"}.get(i % 20, "train")
        wanted[split] += f"document {i}\n\n"
    assert splits(tmp_path) == wanted


@pytest.mark.parametrize("letter", ["x", "é", "漢", "𝄞"])
@pytest.mark.parametrize("count", [40_001, 150_000, 1_000_000])
def test_40_000_characters_of_any_script_are_enough(
    tmp_path: Path, letter: str, count: int
) -> None:
    write(tmp_path, "a.txt", letter * count)
    texts = splits(tmp_path)
    assert sum(text.count(letter) for text in texts.values()) == count
    assert all(text.count(letter) >= count / 50 for text in texts.values())


def test_missing_folders_missing_files_and_too_little_text_are_named(tmp_path: Path) -> None:
    def error(*folder_and_pattern: str) -> str:
        with pytest.raises(InputError) as raised:
            list(TextFolder(*folder_and_pattern).chunks("train"))
        return str(raised.value)

    folder = str(tmp_path)
    assert f"cannot read folder '{folder}/nowhere' (No such file" in error(f"{folder}/nowhere")
    assert f"no *.txt or *.md in '{folder}'; set data.source.pattern" in error(folder)
    write(tmp_path, "a.rst", "words")
    write(tmp_path, ".git/a.txt", "words")
    write(tmp_path, ".hidden.txt", "words")
    assert "no *.txt or *.md in " in error(folder)
    write(tmp_path, "b.rst", "words")
    assert "too short for a train, validation and test split; give at least 20 files or " in error(
        folder, "*.rst"
    )


def test_bytes_in_errors_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hlbgpt.data.sources, "_BLOCK_BYTES", 7)
    write(tmp_path, "a.txt", lines(5000))
    (tmp_path / "b.txt").write_bytes("é\n".encode() * 20 + b"\xff")
    with pytest.raises(InputError, match=r"b\.txt: not UTF-8 text at byte 60 "):
        splits(tmp_path)
    (tmp_path / "b.txt").write_bytes("é\n".encode() * 20 + bytes(1))
    with pytest.raises(InputError, match=r"b\.txt: not text: byte 60 is NUL"):
        splits(tmp_path)


def test_patterns_name_files_or_their_folders(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "poems/c.rst", "poems/deep/d.txt"):
        write(tmp_path, name, "words")

    def found(*pattern: str | list[str]) -> str:
        files = TextFolder(str(tmp_path), *pattern).files()
        return " ".join(Path(file).relative_to(tmp_path).as_posix() for file in files)

    assert found() == "a.txt b.md poems/deep/d.txt"
    assert found("*.rst") == "poems/c.rst"
    assert found("poems/*") == "poems/c.rst poems/deep/d.txt"
    assert found(["b.md", "*.rst"]) == "b.md poems/c.rst"


def test_the_fingerprint_follows_every_file(tmp_path: Path) -> None:
    def found() -> str:
        return TextFolder(str(tmp_path)).fingerprint("train")

    write(tmp_path, "a.txt", "a")
    write(tmp_path, "b/b.md", "b")
    seen = [found()]
    assert found() == seen[0]
    write(tmp_path, "c.rst", "not of the pattern")
    assert found() == seen[0]
    write(tmp_path, "b/b.md", "bb")
    seen.append(found())
    (tmp_path / "a.txt").rename(tmp_path / "c.txt")
    seen.append(found())
    write(tmp_path, "d.txt", "")
    seen.append(found())
    assert len(set(seen)) == 4


MINE = '''
import json
from collections.abc import Iterator
from pathlib import Path

from hlbgpt.data import TextSource


class JsonLines(TextSource):
    """The texts of a .jsonl file; of 20 lines one is for validation and one for the test."""

    def __init__(self, file: str = "texts.jsonl") -> None:
        self.file = Path(file)

    def fingerprint(self, split: str) -> str:
        return f"{self.file.resolve()} {self.file.stat().st_mtime_ns}"

    def chunks(self, split: str) -> Iterator[str]:
        with self.file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if split == {0: "validation", 1: "test"}.get(number % 20, "train"):
                    yield json.loads(line)["text"] + "\\n\\n"
'''


def test_a_folder_and_a_class_of_ones_own_train(hlbgpt, tiny: list[str], text: str) -> None:
    Path("mine.py").write_text(MINE)
    parts = text[:80_000].split("\n\n")
    Path("texts.jsonl").write_text("".join(f"{json.dumps({'text': part})}\n" for part in parts))
    Path("my_texts").mkdir()
    Path("my_texts/a.txt").write_text(text)
    Path("own.yaml").write_text(
        "data: {source: {class_path: hlbgpt.data.TextFolder, init_args: {folder: my_texts}}}\n"
    )
    cache, *small = tiny[2:]
    own = ["--data.source=mine.JsonLines"]
    folder = ["--data.source=hlbgpt.data.TextFolder", "--data.source.folder=my_texts"]
    for source in (own, folder, [*folder, "--data.source.pattern=*.txt"], ["--config", "own.yaml"]):
        assert "target NOT met" in hlbgpt("fit", *QUICKSTART, *source, cache, *small)
    assert len(list(Path(cache.split("=")[1]).glob("*.tokens"))) == 4
