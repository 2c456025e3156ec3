"""A folder of texts: all of it in three splits, the same every time, whatever comes and goes."""

import itertools
import json
import random
from pathlib import Path

import pytest
from conftest import QUICKSTART
from hypothesis import given
from hypothesis import strategies as st

import hlbgpt.data.sources
from hlbgpt.data import TextFolder, textfolder
from hlbgpt.data.sources import SPLITS
from hlbgpt.utils.errors import InputError


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfolder, "_BLOCK", 40)


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


def split_of(texts: dict[str, str]) -> dict[str, str]:
    return {line: split for split, text in texts.items() for line in text.split("\n") if line}


@given(
    st.text("ab \n", max_size=400).map(lambda text: text * 5),
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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfolder, "_BLOCK", block)
        blocks = list(textfolder.cut(pieces()))
        assert blocks == list(textfolder.cut(iter([text])))
    assert "".join(blocks) == text
    assert all(block <= len(part) <= 2 * block + 1 for part in blocks[:-1])
    assert all(blocks)


def test_blocks_end_with_paragraphs_or_else_lines_or_words(small_blocks) -> None:
    for mark in ("\n\n", "\n", " "):
        text = ("x" * 17 + mark) * 20
        assert all(part.endswith(mark) for part in textfolder.cut(iter([text])))
    assert {len(part) for part in textfolder.cut(iter(["x" * 800]))} == {80}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("names", [1, 300], ids=["one large file", "many small ones"])
def test_every_line_is_in_one_split(tmp_path: Path, names: int) -> None:
    for i in range(names):
        write(tmp_path, f"{i % 7}/{i}.txt", lines(3000 // names, f"f{i}"))
    texts = splits(tmp_path)
    every = [line for text in texts.values() for line in text.split("\n") if line]
    assert len(every) == len(set(every)) == 3000
    shares = {split: len(text) / sum(map(len, texts.values())) for split, text in texts.items()}
    assert shares == {
        "train": pytest.approx(0.9, abs=0.04),
        "validation": pytest.approx(0.05, abs=0.02),
        "test": pytest.approx(0.05, abs=0.02),
    }
    source = TextFolder(str(tmp_path))
    for split, text in texts.items():
        assert source.size(split) == pytest.approx(len(text.encode()), rel=0.5)


@pytest.mark.usefixtures("small_blocks")
def test_lines_stay_in_their_split_when_files_come_and_grow(tmp_path: Path) -> None:
    write(tmp_path, "b.txt", lines(3000, "b"))
    before = split_of(splits(tmp_path))
    write(tmp_path, "a/a.md", lines(500, "a"))
    with (tmp_path / "b.txt").open("a") as file:
        file.write(lines(50, "more"))
    after = split_of(splits(tmp_path))
    assert len(after) == 3550
    assert {line: after[line] for line in before} == before


def test_documents_are_told_apart_by_a_blank_line(tmp_path: Path) -> None:
    for i, text in enumerate(["none", "one\n", "two\n\n"]):
        for j in range(60):
            write(tmp_path, f"{i}_{j:02}.txt", f"{text}")
    texts = splits(tmp_path)
    for text in texts.values():
        documents = text.split("\n\n")
        assert documents.pop() == ""
        assert set(documents) == {"none", "one", "two"}
    assert sum(text.count("\n\n") for text in texts.values()) == 180


def test_a_gap_between_blocks_is_a_blank_line(tmp_path: Path, small_blocks) -> None:
    write(tmp_path, "a.txt", lines(2000))
    train = splits(tmp_path)["train"]
    parts = [[int(line[-6:]) for line in part.splitlines()] for part in train.split("\n\n") if part]
    assert len(parts) > 10
    for part in parts:
        assert part == list(range(part[0], part[-1] + 1))
    for part, after in itertools.pairwise(parts):
        assert after[0] > part[-1] + 1


@pytest.mark.parametrize("seed", range(20))
def test_three_files_are_enough(tmp_path: Path, seed: int) -> None:
    random_name = random.Random(seed).random
    for _ in range(3 + seed % 3):
        write(tmp_path, f"{random_name()}.txt", "a few words, ")
    assert all("a few words" in text for text in splits(tmp_path).values())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("seed", range(20))
def test_a_small_folder_has_enough_of_every_split(tmp_path: Path, seed: int) -> None:
    write(tmp_path, f"{seed}.txt", lines(60))
    total = len(lines(60))
    assert all(len(text) >= total / 40 for text in splits(tmp_path).values())


def test_what_is_too_little_or_not_there_is_named(tmp_path: Path) -> None:
    def error(*folder_and_pattern: str) -> str:
        with pytest.raises(InputError) as raised:
            list(TextFolder(*folder_and_pattern).chunks("train"))
        return str(raised.value)

    folder = str(tmp_path)
    assert error(f"{folder}/nowhere").startswith("data.source.folder: no folder '")
    assert f"no *.txt or *.md in '{folder}', only nothing; set" in error(folder)
    write(tmp_path, "a.rst", "words")
    write(tmp_path, ".git/a.txt", "words")
    write(tmp_path, ".hidden.txt", "words")
    assert "only *.rst; set data.source.pattern, such as" in error(folder)
    assert "5 characters in " in error(folder, "*.rst")
    write(tmp_path, "b.rst", "words")
    assert "give at least three files or 65,536 characters" in error(folder, "*.rst")


def test_bytes_in_errors_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hlbgpt.data.sources, "_BLOCK_BYTES", 7)
    write(tmp_path, "a.txt", lines(9))
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
        return " ".join(TextFolder(str(tmp_path), *pattern).files())

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
