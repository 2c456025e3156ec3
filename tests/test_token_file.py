"""Token files are whole and what they say they are, or refused."""

import errno
import os
import re
import signal
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import names, prepare_token_file, synthetic_encoding
from hypothesis import given
from hypothesis import strategies as st

import hlbgpt.data.encoder as encoder
from hlbgpt.data.prepare import parts_of
from hlbgpt.data.sources import TextFiles, TextSource
from hlbgpt.data.token_file import DamagedFileError, TokenFile
from hlbgpt.data.tokenizer import Tokenizer, load_tokenizer
from hlbgpt.utils.errors import InputError

BYTES = load_tokenizer("bytes")
WIDE = Tokenizer(synthetic_encoding("o200k_base"), ["many", " , é"])
OTHER_TYPE = {b"<u2": b"<u4", b"<u4": b"<u2"}
both_widths = pytest.mark.parametrize("tokenizer", [BYTES, WIDE], ids=str)


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


def sealed(data: bytes) -> bytes:
    """The file with the checksum of the header that it has."""
    return data[:4092] + zlib.crc32(data[:4092]).to_bytes(4, "little") + data[4096:]


def prepare(path: Path, source: TextSource) -> None:
    prepare_token_file(path, source, "train", lambda: BYTES)


def build(path: Path, source: TextSource | None = None, tokenizer: Tokenizer = BYTES) -> TokenFile:
    return prepare_token_file(path, source or Lines(1000), "train", lambda: tokenizer)


@both_widths
def test_a_file_holds_the_tokens_and_says_what_they_are(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    file = build(tmp_path / "deep" / "folder" / "a.tokens", tokenizer=tokenizer)
    text = "".join(Lines(1000).chunks("train"))
    expected = tokenizer.encode(text)
    assert file.tokens.tolist() == expected
    assert file.tokens.dtype == (np.uint16 if tokenizer is BYTES else np.uint32)
    header = file.header
    assert (header.tokens, header.text_bytes) == (len(expected), len(text.encode()))
    assert (header.tokenizer, header.vocab_size) == (str(tokenizer), tokenizer.vocab_size)
    file.verify()
    assert names(file.path.parent) == ["a.tokens"]


def test_a_build_that_stops_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the machine stopped"):
        build(tmp_path / "a.tokens", Lines(1000, fails_at=900))
    assert names(tmp_path) == []


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the train split is empty"):
        build(tmp_path / "a.tokens", Lines(0))
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        InputError, match=r"data: .*/file: File exists; .* data\.cache_dir a folder"
    ):
        build(tmp_path / "file" / "a.tokens")


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"data: .*: No space left on device; "):
        build(tmp_path / "a.tokens")
    assert names(tmp_path) == []


def test_a_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    class Unreadable(Lines):
        def chunks(self, split: str) -> Iterator[str]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/texts/secret.txt")
            yield

    with pytest.raises(InputError, match=r"data: /texts/secret\.txt: Permission denied; "):
        build(tmp_path / "a.tokens", Unreadable(3))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-2], "damaged: its header promises"),
        (lambda data: data[:-1], "damaged: its header promises"),
        (lambda data: data + b"\0\0", "damaged: its header promises"),
        (lambda data: data[:-2] + b"\1\1", "do not match the checksum"),
        (lambda data: data[:50], "header does not match its checksum"),
        (lambda data: data[:7] + b"\x01" + data[8:], "not a token file of format version 5"),
        (lambda data: bytes(5000), "not a token file of format version 5"),
        (lambda data: b"", "not a token file of format version 5"),
        (lambda data: data.replace(b'"text_bytes": ', b'"text_bytes": 1', 1), "its checksum"),
        (lambda data: data.replace(b'"<u', b'">u', 1), "header does not match its checksum"),
        (lambda data: sealed(data.replace(b'"<u', b'">u', 1)), "header cannot be read"),
        (lambda data: sealed(re.sub(rb"<u\d", lambda m: OTHER_TYPE[m[0]], data)), "promises"),
        (lambda data: sealed(data.replace(b'"tokens"', b'"tokenz"', 1)), "header cannot be read"),
    ],
)
@both_widths
def test_damaged_files_are_rebuilt(
    tmp_path: Path, damage, message: str, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.tokens"
    build(path, tokenizer=tokenizer)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.raises(DamagedFileError, match=message):
        TokenFile(path).verify()
    build(path, tokenizer=tokenizer)
    assert path.read_bytes() == whole
    out = capsys.readouterr().out
    assert out.count(message) == 1
    assert "building it again" in out


@given(
    edits=st.lists(
        st.tuples(
            st.sampled_from(["flip", "cut", "insert"]), st.integers(0, 9000), st.binary(max_size=9)
        ),
        min_size=1,
        max_size=3,
    )
)
def test_the_reader_never_hands_out_other_tokens(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[str, int, bytes]]
) -> None:
    """Whatever happens to the bytes: an InputError, or the tokens that were written."""
    path = tmp_path_factory.mktemp("fuzz") / "a.tokens"
    build(path, Lines(200))
    written = TokenFile(path)
    expected = written.tokens.tolist()
    data = path.read_bytes()
    for kind, place, extra in edits:
        place %= len(data) + 1
        if kind == "cut":
            data = data[:place]
        elif kind == "insert":
            data = data[:place] + extra + data[place:]
        else:
            data = (
                data[:place]
                + bytes(b ^ 255 for b in data[place : place + len(extra)])
                + (data[place + len(extra) :])
            )
    path.write_bytes(data)
    try:
        file = TokenFile(path)
        file.verify()
    except InputError:
        return
    assert file.tokens.tolist() == expected
    assert file.header == written.header


# --- several processes, and processes that die ------------------------------------------------


class Witnessed(Lines):
    """Leaves a file behind for each time it is read, and reads slowly."""

    def __init__(self, folder: Path, pause: float = 0.0) -> None:
        super().__init__(300)
        self.folder, self.pause = folder, pause

    def chunks(self, split: str) -> Iterator[str]:
        (self.folder / f"read_by_{os.getpid()}").touch()
        for line in super().chunks(split):
            time.sleep(self.pause)
            yield line


def in_child(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def test_four_processes_build_a_file_once(tmp_path: Path) -> None:
    source, path = Witnessed(tmp_path, pause=1e-3), tmp_path / "cache" / "a.tokens"
    children = [in_child(lambda: prepare(path, source)) for _ in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert len(list(tmp_path.glob("read_by_*"))) == 1
    assert names(path.parent) == ["a.tokens"]
    TokenFile(path).verify()


def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "a.tokens"
    source = Witnessed(tmp_path, pause=5e-3)
    for _ in range(3):
        child = in_child(lambda: prepare(path, source))
        while not list(path.parent.glob(".*.tmp")):
            time.sleep(1e-3)
        time.sleep(0.1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not path.exists()
        assert len(list(path.parent.glob(".*.tmp"))) == 1
    prepare(path, Lines(300))
    assert names(path.parent) == ["a.tokens"]
    TokenFile(path).verify()


def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    class Changing(Lines):
        def chunks(self, split: str) -> Iterator[str]:
            yield from super().chunks(split)
            self.count += 1

    with pytest.raises(InputError, match="changed while it was tokenized"):
        build(tmp_path / "a.tokens", Changing(10))
    assert names(tmp_path) == []


class SameFingerprint(Lines):
    """Another text under the same name."""


def test_the_name_tells_texts_and_tokenizers_apart(tmp_path: Path) -> None:
    names = {
        part.path.name
        for source in (Lines(1), Lines(2), SameFingerprint(1))
        for split in ("train", "test")
        for tokenizer in ("gpt2", "bytes")
        for special in ([], ["a", "b"], ["b", "a"], ["a, b"])
        for part in parts_of(tmp_path, source, split, tokenizer, special)
    }
    assert len(names) == 48


def test_memory_does_not_grow_with_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "_CACHED_PIECES", 500)
    monkeypatch.setattr(encoder, "_CHUNK_CHARS", 1 << 12)

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
    file = prepare_token_file(tmp_path / "a.tokens", source, "test", lambda: BYTES)
    assert file.header.tokens == file.header.text_bytes == 1_290_590
