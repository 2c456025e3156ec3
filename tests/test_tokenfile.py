"""Token files are whole and what they say they are, or refused."""

import errno
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import hlbgpt.data.tokenizer as tokenizer
from hlbgpt.data.text import TextFiles, TextSource
from hlbgpt.data.tokenfile import TokenFile, build_token_file, token_file_path
from hlbgpt.data.tokenizer import load_tokenizer
from hlbgpt.errors import InputError

BYTES = load_tokenizer("bytes")


class Lines(TextSource):
    """`count` lines, made as they are read; fails at line `fails_at`."""

    def __init__(self, count: int, fails_at: int = -1) -> None:
        self.count, self.fails_at = count, fails_at

    def fingerprint(self, split: str) -> str:
        return f"lines:{self.count}"

    def chunks(self, split: str) -> Iterator[str]:
        for i in range(self.count):
            if i == self.fails_at:
                raise RuntimeError("the machine stopped")
            yield f" line {i} of many , é . \n"


def build(path: Path, source: TextSource | None = None) -> TokenFile:
    return build_token_file(path, source or Lines(1000), "train", BYTES)


def test_a_file_holds_the_tokens_and_says_what_they_are(tmp_path: Path) -> None:
    file = build(tmp_path / "deep" / "folder" / "a.tokens")
    text = "".join(Lines(1000).chunks("train")).encode()
    assert file.tokens.tolist() == list(text)
    assert file.tokens.dtype == np.uint16
    header = file.header
    assert (header.tokenizer, header.vocab_size, header.split) == ("bytes", 256, "train")
    assert (header.source, header.tokens, header.text_bytes) == ("lines:1000", len(text), len(text))
    file.verify()
    assert [path.name for path in file.path.parent.iterdir()] == ["a.tokens"]


def test_a_build_that_stops_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the machine stopped"):
        build(tmp_path / "a.tokens", Lines(1000, fails_at=900))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the train split is empty"):
        build(tmp_path / "a.tokens", Lines(0))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"data\.cache_dir: .*/file: "):
        build(tmp_path / "file" / "a.tokens")


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"data\.cache_dir: .*a\.tokens: No space left on device"):
        build(tmp_path / "a.tokens")
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    class Unreadable(Lines):
        def chunks(self, split: str) -> Iterator[str]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/texts/secret.txt")
            yield

    with pytest.raises(InputError, match=r"data\.source: /texts/secret\.txt: Permission denied"):
        build(tmp_path / "a.tokens", Unreadable(3))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-2], "cut short or overwritten: its header promises"),
        (lambda data: data[:-1], "cut short or overwritten"),
        (lambda data: data + b"\0\0", "cut short or overwritten"),
        (lambda data: data[:-2] + b"\1\1", "do not match the checksum"),
        (lambda data: b"text" + data[4:], "not a token file"),
        (lambda data: data[:100], "header is damaged"),
        (lambda data: b"", "not a token file"),
        (lambda data: data[:7] + b"\x09" + data[8:], "format 09, this version reads 01"),
        (lambda data: data.replace(b'"tokens"', b'"tokenz"', 1), "header is damaged"),
    ],
)
def test_damage_is_noticed(tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "a.tokens"
    build(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        TokenFile(path).verify()


@pytest.mark.parametrize("field", ["tokenizer", "source", "split"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, field: str) -> None:
    file = build(tmp_path / "a.tokens")
    wanted = {"tokenizer": "bytes", "source": "lines:1000", "split": "train"}
    file.require(**wanted)
    with pytest.raises(InputError, match=f"made with {field} .*, but this run asks for 'other'"):
        file.require(**{**wanted, field: "other"})


def test_the_name_tells_texts_and_tokenizers_apart(tmp_path: Path) -> None:
    names = {
        token_file_path(tmp_path, source, split, tokenizer).name
        for source in (Lines(1), Lines(2))
        for split in ("train", "test")
        for tokenizer in ("gpt2", "bytes")
    }
    assert len(names) == 8


def test_memory_does_not_grow_with_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "_MEMO_PIECES", 500)
    monkeypatch.setattr(tokenizer, "_CHUNK_CHARS", 1 << 12)

    def peak(count: int) -> int:
        tracemalloc.start()
        build(tmp_path / f"{count}.tokens", Lines(count))
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    build(tmp_path / "warm.tokens")  # what is made once
    assert peak(30_000) < 1.2 * peak(5_000)


def test_real_text_file(tmp_path: Path, test_data: Path) -> None:
    source = TextFiles(test=str(test_data / "wikitext" / "wiki.test.raw"))
    file = build_token_file(tmp_path / "a.tokens", source, "test", BYTES)
    assert file.header.tokens == file.header.text_bytes == 1_290_590
