"""What all commands do alike: errors in one line, exit codes, signals, and output that is lost."""

import contextlib
import errno
import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn, TextIO, cast

from hlbgpt.utils.errors import DivergedError, InputError, one_line

_CLOSED_PIPE = 128 + 13  # what a shell reports of a program that SIGPIPE ended
# Windows knows no SIGHUP, which a terminal sends when it is closed.
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(SystemExit):
    """A signal stopped the command; the exit code is 128 + its number.

    Attributes:
        signum: The signal's number.
        told: Whether the user has read so already.
    """

    def __init__(self, signum: int, *, told: bool = False) -> None:
        super().__init__(128 + signum)
        self.signum, self.told = signum, told


def command(
    program: str, *, needs_output: bool = True, advice: str = ""
) -> Callable[..., Callable[..., int]]:
    """Decorate the `main` of a command, which then returns its exit code.

    What a user can put right ends in the line `PROGRAM: error: ...` and code 2, a run that diverged
    in code 1, a signal in a line and 128 + its number. With HLBGPT_TRACEBACK=1 in the environment,
    errors show their traceback. Other exceptions are bugs and are raised.

    A character that stdout cannot encode is replaced. If stdout is closed or full, the command
    stops: in silence and with code 141 where a pipe was closed, as by `| head`, and else as by an
    error.

    Args:
        program: Its name, as the user typed it.
        needs_output: Whether it stops when its output is lost; else that is told at its end.
        advice: What to do after a signal has stopped it.
    """

    def decorate(main: Callable[..., int | None]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(*arguments: Any, **settings: Any) -> int:
            with _outputs(needs_output) as output, _stopped_by_signals():
                try:
                    code = main(*arguments, **settings) or 0
                except BaseException as error:
                    show = os.environ.get("HLBGPT_TRACEBACK") and isinstance(error, Exception)
                    if show or (found := _exit_code(program, advice, error)) is None:
                        raise
                    code = found
                output.finish()
                if output.failure is None or code:
                    return code
                if isinstance(output.failure, BrokenPipeError):
                    return _CLOSED_PIPE
                why = getattr(output.failure, "strerror", None) or one_line(output.failure)
                sys.stderr.write(f"{program}: error: cannot write to stdout: {why}\n")
                return 2

        return run

    return decorate


# --- errors -----------------------------------------------------------------------------------


def _exit_code(program: str, advice: str, error: BaseException) -> int | None:
    """Tell the user about `error` in one line; None, and not a word, if it is a bug."""
    # Lightning makes another exit of Ctrl-C, and cleaning up after a signal may fail.
    if isinstance(error.__context__, (KeyboardInterrupt, Interrupted)):
        error = error.__context__
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted(signal.SIGINT)
    if isinstance(error, Interrupted):
        if not error.told:
            what = "; ".join(filter(None, (stopped_by(error.signum), advice)))
            sys.stderr.write(f"{program}: {what}\n")
        return 128 + error.signum
    if isinstance(error, SystemExit):
        if isinstance(error.code, str):
            sys.stderr.write(f"{program}: error: {one_line(error.code)}\n")
            return 1
        return error.code or 0
    if (message := _message(error)) is None:
        return None
    sys.stderr.write(f"{program}: error: {message}\n")
    return 1 if isinstance(error, DivergedError) else 2


def _message(error: BaseException) -> str | None:
    """What to say of an error that a user can put right; None for a bug."""
    if isinstance(error, (InputError, OSError, DivergedError)):
        return one_line(error)
    if is_out_of_memory(error):
        found = re.search(r"to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        what = f" (tried {found[0]})" if found else ""
        return (
            f"out of memory{what}; use smaller micro-batches (data.micro_batch_size or "
            "schedule.micro_batch_tokens, data.eval_batch_size) or a smaller network"
        )
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return "a path holds the character NUL, which no file name can have; take it out"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there is too little memory, on any device; torch has no one class for that."""
    words = r"out of memory|allocate memory|not enough memory"
    found = isinstance(error, RuntimeError) and re.search(words, str(error))
    return isinstance(error, MemoryError) or bool(found)


# --- signals ----------------------------------------------------------------------------------


def stopped_by(signum: int) -> str:
    """What a user reads of a signal that stopped the command."""
    return f"stopped by {signal.Signals(signum).name}"


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Let `handler` take the signals that stop a command, but those that are ignored.

    `nohup` has SIGHUP ignored, and a shell SIGINT for what runs in the background.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # others get no signals
        return
    caught = [signum for signum in STOPS if signal.getsignal(signum) != signal.SIG_IGN]
    earlier = {signum: signal.signal(signum, handler) for signum in caught}
    try:
        yield
    finally:
        for signum, before in earlier.items():
            if before is not None:
                signal.signal(signum, before)


def _stopped_by_signals() -> contextlib.AbstractContextManager[None]:
    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        if signum == getattr(signal, "SIGHUP", None):
            # A terminal that is closed sends it twice, the second time while we clean up.
            signal.signal(signum, signal.SIG_IGN)
        raise Interrupted(signum)

    return handled(stop)


def killed_by_signals(program: str) -> contextlib.AbstractContextManager[None]:
    """Let signals end the process on the spot, with a line, while it imports modules.

    Nothing needs to be cleaned up then, and an exception would come out of an import as another.
    """

    def end(signum: int, frame: FrameType | None) -> NoReturn:
        with contextlib.suppress(OSError):  # no stderr
            os.write(2, f"{program}: {stopped_by(signum)}\n".encode())
        os._exit(128 + signum)

    return handled(end)


# --- output -----------------------------------------------------------------------------------


class Output:
    """A text stream that replaces what it cannot encode, and survives that it is closed or full.

    Everything but writing is left to the stream itself.

    Args:
        stream: Where to write; None if Python found it closed.
        stops: Whether the first failure raises SystemExit. From then on nothing is written.

    Attributes:
        failure: The first failure.
    """

    def __init__(self, stream: TextIO | None, *, stops: bool) -> None:
        self._is_closed = stream is None
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self.stops = stops
        self.failure: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._do(lambda: self._write(text))
        return len(text)

    def flush(self) -> None:
        self._do(self._stream.flush)

    def _do(self, action: Callable[[], Any]) -> None:
        if self.failure is not None:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: the stream was closed in Python
            self.failure = error
            if self.stops:
                raise SystemExit(0) from None  # `command` finds the failure

    def _write(self, text: str) -> None:
        if self._is_closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self._stream.write(text.encode(error.encoding, "replace").decode(error.encoding))

    def finish(self) -> None:
        """Write what is buffered, or drop it: Python would try again at its end, and complain."""
        self.stops = False
        self.flush()
        if self.failure is None:
            return
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream without a file
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            self._stream.flush()


@contextlib.contextmanager
def _outputs(needs_output: bool) -> Iterator[Output]:
    """Replace stdout and stderr by an `Output` each; yields that of stdout."""
    _open_standard_files()
    stdout, stderr = sys.stdout, sys.stderr
    output, errors = Output(stdout, stops=needs_output), Output(stderr, stops=False)
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, errors)
    try:
        yield output
    finally:
        sys.stdout, sys.stderr = stdout, stderr
        output.finish()
        errors.finish()


def _open_standard_files() -> None:
    """Open what the caller has closed of files 0 to 2: no file of ours may get such a number."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


@contextlib.contextmanager
def output_optional() -> Iterator[None]:
    """Go on without stdout where it is closed or full; in a command, that is told at its end."""
    stdout = sys.stdout
    if isinstance(stdout, Output):
        stops, stdout.stops = stdout.stops, False
        try:
            yield
        finally:
            stdout.stops = stops
        return
    sys.stdout = cast(TextIO, Output(stdout, stops=False))
    try:
        yield
    finally:
        sys.stdout = stdout
