"""What all commands do alike: errors in one line, exit codes, signals, and output that is lost."""

import errno
import io
import os
import pty
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hlbgpt.utils.command import STOPS, Interrupted, command, output_optional
from hlbgpt.utils.errors import DivergedError, InputError

MICRO = "use smaller micro-batches"


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def kill(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


def ctrl_c_in_lightning() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB"
ERRORS: dict[str, tuple[Callable[[], Any], int, str]] = {
    "success": (lambda: None, 0, ""),
    "a code of its own": (lambda: 3, 3, ""),
    "input": (raising(InputError("key:  two\nlines")), 2, "prog: error: key: two lines"),
    "missing file": (lambda: Path("no/file").read_text(), 2, "prog: error: [Errno 2] No such file"),
    "full disk": (raising(OSError(errno.ENOSPC, "No space left")), 2, "prog: error: [Errno 28] No"),
    "diverged": (raising(DivergedError("diverged: nan")), 1, "prog: error: diverged: nan"),
    "numpy's memory": (
        lambda: np.empty(10**15),
        2,
        "prog: error: out of memory (tried to allocate 7.11 PiB); " + MICRO,
    ),
    "torch's memory": (
        lambda: torch.empty(10**14),
        2,
        "prog: error: out of memory (tried to allocate 400000000000000 bytes); " + MICRO,
    ),
    "a GPU's memory": (
        raising(torch.OutOfMemoryError(CUDA)),
        2,
        "prog: error: out of memory (tried to allocate 20.00 GiB); " + MICRO,
    ),
    "NUL in a path": (
        lambda: Path("a\0b").read_text(),
        2,
        "prog: error: a path holds the",
    ),
    "exit": (lambda: sys.exit(4), 4, ""),
    "exit with words": (lambda: sys.exit("why"), 1, "prog: error: why"),
    "KeyboardInterrupt": (raising(KeyboardInterrupt()), 130, "prog: stopped by SIGINT"),
    "Lightning's exit": (ctrl_c_in_lightning, 130, "prog: stopped by SIGINT"),
    "SIGINT": (kill(signal.SIGINT), 130, "prog: stopped by SIGINT"),
    "SIGTERM": (kill(signal.SIGTERM), 143, "prog: stopped by SIGTERM"),
    "SIGHUP": (kill(signal.SIGHUP), 129, "prog: stopped by SIGHUP"),
    "told already": (raising(Interrupted(signal.SIGTERM, told=True)), 143, ""),
}


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Let signals count: a shell has Ctrl-C ignored by what it runs in the background."""
    before = {signum: signal.signal(signum, signal.default_int_handler) for signum in STOPS}
    yield
    assert {signal.getsignal(signum) for signum in STOPS} == {signal.default_int_handler}
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize(("main", "code", "line"), ERRORS.values(), ids=ERRORS)
def test_each_end_has_its_line_and_code(
    main: Callable[[], Any], code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    streams = sys.stdout, sys.stderr
    assert command("prog")(main)() == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == bool(line)
    assert (sys.stdout, sys.stderr) == streams


def test_advice_after_a_signal(capsys: pytest.CaptureFixture[str]) -> None:
    main = command("prog", advice="the same command goes on")(kill(signal.SIGTERM))
    assert main() == 143
    assert capsys.readouterr().err == "prog: stopped by SIGTERM; the same command goes on\n"


@pytest.mark.parametrize("error", [RuntimeError("bug"), ValueError("bug"), TypeError()], ids=repr)
def test_bugs_are_raised(error: Exception) -> None:
    with pytest.raises(type(error)) as found:
        command("prog")(raising(error))()
    assert found.value is error


def test_a_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HLBGPT_TRACEBACK", "1")
    with pytest.raises(InputError):
        command("prog")(raising(InputError("key: 3")))()


def test_ignored_signals_stay_so() -> None:
    """As `nohup` asks for."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert command("prog")(kill(signal.SIGHUP))() == 0
    finally:
        signal.signal(signal.SIGHUP, signal.default_int_handler)


def test_a_second_sighup_does_not_disturb_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    """A terminal that is closed sends two."""
    cleaned = []

    def main() -> None:
        try:
            kill(signal.SIGHUP)()
        finally:
            kill(signal.SIGHUP)()
            cleaned.append("up")

    assert command("prog")(main)() == 129
    assert cleaned == ["up"]


# --- output -----------------------------------------------------------------------------------


def closed_pipe() -> io.TextIOBase:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def full_disk() -> io.TextIOBase:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    return open("/dev/full", "w")


def gone_terminal() -> io.TextIOBase:
    master, terminal = pty.openpty()
    os.close(master)
    return open(terminal, "w")


def closed_in_python() -> io.TextIOBase:
    stream = io.StringIO()
    stream.close()
    return stream


LOST: dict[str, tuple[Callable[[], Any], int, str]] = {
    "pipe": (closed_pipe, 141, ""),
    "disk": (full_disk, 2, "prog: error: cannot write to stdout: No space left on device\n"),
    "terminal": (gone_terminal, 2, "prog: error: cannot write to stdout: Input/output error\n"),
    "closed": (lambda: None, 2, "prog: error: cannot write to stdout: Bad file descriptor\n"),
    "in Python": (closed_in_python, 2, "prog: error: cannot write to stdout: I/O operation on "),
}
lost_stdout = pytest.mark.parametrize(("stdout", "code", "line"), LOST.values(), ids=LOST)


@pytest.mark.parametrize("needs_output", [True, False])
@lost_stdout
def test_lost_output_ends_a_command_or_costs_it_nothing(
    stdout: Callable[[], Any],
    code: int,
    line: str,
    needs_output: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = []

    @command("prog", needs_output=needs_output)
    def main() -> None:
        for _ in range(3):
            made.append(print("text", flush=True))

    monkeypatch.setattr(sys, "stdout", stdout())
    assert main() == code
    assert len(made) == (0 if needs_output else 3)
    assert capsys.readouterr().err.startswith(line)
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()  # as Python does at its end


def test_what_is_buffered_is_lost_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", closed_pipe())
    assert command("prog")(lambda: print("text"))() == 141
    monkeypatch.setattr(sys, "stdout", closed_pipe())
    assert command("prog")(lambda: print("text") or 3)() == 3  # says more


def test_a_part_may_do_without_output(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    @command("prog")
    def main() -> None:
        with output_optional():
            made.append(print("text", flush=True))

    monkeypatch.setattr(sys, "stdout", closed_pipe())
    assert main() == 141
    assert len(made) == 1
    monkeypatch.setattr(sys, "stdout", stream := closed_pipe())
    with output_optional():  # outside of a command nobody is told
        print("text", flush=True)
    assert sys.stdout is stream
    with pytest.raises(BrokenPipeError):
        print("text", flush=True)
    command("prog")(lambda: None)()  # takes the text from Python, which would complain


def test_characters_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert command("prog")(lambda: print("thé \udcff│"))() == 0
    assert raw.getvalue() == b"th? ??\n"


@pytest.mark.parametrize(
    ("words", "streams", "code", "line"),
    [
        ("--help", "| true", 141, b""),
        ("--help", "> /dev/full", 2, b"hlbgpt: error: cannot write to stdout: No space left on"),
        ("--help", ">&-", 2, b"hlbgpt: error: cannot write to stdout: Bad file descriptor\n"),
        ("--help", "> /dev/null 2>&-", 0, b""),
        ("nonsense", "> /dev/null 2>&-", 2, b""),
        ("nonsense", "> /dev/null 2> /dev/full", 2, b""),
    ],
)
def test_a_process_ends_without_pythons_complaints(
    words: str, streams: str, code: int, line: bytes
) -> None:
    """As `Exception ignored in ...`, with which Python meets a stream that fails at its end."""
    python = shlex.quote(sys.executable)
    script = f"set -o pipefail; (sleep 0.1; exec {python} -m hlbgpt {words}) {streams}"
    done = subprocess.run(["bash", "-c", script], capture_output=True)
    assert done.returncode == code
    assert done.stderr.startswith(line)
    assert done.stderr.count(b"\n") == bool(line)


@pytest.mark.parametrize("signum", STOPS)
def test_signals_while_modules_are_imported(signum: signal.Signals, tmp_path: Path) -> None:
    """Whatever the module that is being imported makes of exceptions."""
    (tmp_path / "lightning.py").write_text(
        f"import os, time\ntry:\n    os.kill(os.getpid(), {int(signum)})\n    time.sleep(9)\n"
        "except BaseException:\n    raise ImportError('optional')\n"
    )
    words = [sys.executable, "-m", "hlbgpt", "fit"]
    path = f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"
    environment = os.environ | {"PYTHONPATH": path}
    reset = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    done = subprocess.run(
        words, capture_output=True, text=True, env=environment, cwd=tmp_path, preexec_fn=reset
    )
    assert done.returncode == 128 + signum
    assert done.stderr == f"hlbgpt: stopped by {signum.name}\n"


@pytest.mark.parametrize(
    ("stop", "code", "name"),
    [(Interrupted(signal.SIGTERM), 143, "SIGTERM"), (KeyboardInterrupt(), 130, "SIGINT")],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_an_error_of_cleaning_up_does_not_hide_the_signal(
    stop: BaseException, code: int, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @command("prog")
    def main() -> None:
        try:
            raise stop
        finally:
            raise OSError("Writer is closed")

    assert main() == code
    assert capsys.readouterr().err == f"prog: stopped by {name}\n"
