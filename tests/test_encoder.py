"""Texts encoded in several processes."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import synthetic_encoding

import hlbgpt.data.encoder
from hlbgpt.data.encoder import Encoder
from hlbgpt.data.tokenizer import Tokenizer, load_tokenizer
from hlbgpt.utils.errors import InputError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux starts processes")
TEXT = "".join(f"Line {i} of , é many . \n\n" for i in range(3_000))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hlbgpt.data.encoder, "_CHUNK_CHARS", 1_000)
    monkeypatch.setattr(hlbgpt.data.encoder, "_CHUNKS_ALONE", 2)


def pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), 333):
        yield text[start : start + 333]


@pytest.mark.parametrize("name", ["bytes", "gpt2", "o200k_base"])
def test_several_processes_give_the_tokens_of_one(name: str) -> None:
    tokenizer = load_tokenizer(name) if name == "bytes" else Tokenizer(synthetic_encoding(name))
    special = Tokenizer(tokenizer.encoding, ["many .", "Line 2"])
    for each in (tokenizer, special):
        with Encoder(each, processes=2) as encoder:
            for text in (
                TEXT,
                "short",
                "",
                TEXT[::-1],
            ):  # one after another, the first of them alone
                found = list(encoder.stream(pieces(text)))
                tokens = np.frombuffer(b"".join(part for part, _ in found), each.dtype)
                assert tokens.tolist() == each.encode(text)
                assert sum(size for _, size in found) == len(text.encode())
            assert len(multiprocessing.active_children()) == 2
        assert multiprocessing.active_children() == []


def test_short_texts_and_single_cpus_start_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("started")

    monkeypatch.setattr(hlbgpt.data.encoder, "ProcessPoolExecutor", refuse)
    for processes, text in ((2, TEXT[:1_500]), (1, TEXT), (0, TEXT)):
        with Encoder(load_tokenizer("bytes"), processes) as encoder:
            assert b"".join(part for part, _ in encoder.stream(pieces(text)))


class Mine(Tokenizer):
    """Does something else than encoding when it meets a mark."""

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        if "KILL" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        if "FAIL" in text:
            raise RuntimeError("cannot be encoded")
        return super().split(text)


@pytest.mark.parametrize(
    ("mark", "error", "message"),
    [
        ("KILL", InputError, "a process that tokenizes was killed, perhaps for lack of memory"),
        ("FAIL", RuntimeError, "cannot be encoded"),
    ],
)
def test_what_happens_in_a_process_is_told(mark: str, error: type[Exception], message: str) -> None:
    text = f"{TEXT} {mark} {TEXT}"
    with (
        pytest.raises(error, match=message),
        Encoder(Mine(load_tokenizer("bytes").encoding), processes=2) as encoder,
    ):
        list(encoder.stream(pieces(text)))
    assert multiprocessing.active_children() == []


def test_ctrl_c_ends_the_processes(capfd: pytest.CaptureFixture[str]) -> None:
    """It reaches them too, and they say nothing of it."""

    def encode() -> None:
        with Encoder(load_tokenizer("bytes"), processes=2) as encoder:
            for number, _ in enumerate(encoder.stream(pieces(TEXT * 9))):
                if number == 20:
                    for child in multiprocessing.active_children():
                        os.kill(child.pid, signal.SIGINT)
                    os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        encode()
    assert multiprocessing.active_children() == []
    assert capfd.readouterr() == ("", "")


def test_a_killed_process_leaves_none_behind(tmp_path: Path) -> None:
    first = os.fork()
    if first == 0:
        try:
            with Encoder(load_tokenizer("bytes"), processes=3) as encoder:
                for number, _ in enumerate(encoder.stream(pieces(TEXT))):
                    if number == 20:
                        found = [str(child.pid) for child in multiprocessing.active_children()]
                        (tmp_path / "pids").write_text(" ".join(found))
                        (tmp_path / "pids").rename(tmp_path / "ready")
                        time.sleep(60)
        finally:
            os._exit(1)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    pids = (tmp_path / "ready").read_text().split()
    assert len(pids) == 3
    assert all(Path("/proc", pid).exists() for pid in pids)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    end = time.monotonic() + 30
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.01)


def _runs(pid: str) -> bool:
    """Whether a process is there and is no zombie that nobody has waited for."""
    try:
        stat = Path("/proc", pid, "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
