"""What benchmark.py and gpu_report.py share: their folder, copies of configs, and processes."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import yaml

from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import atomic_write, locked

if sys.platform != "win32":
    import fcntl

INPUTS = "inputs.json"  # in a folder: the arguments and configs that its results were made from
LOG = "output.log"  # the command of a process, and what it prints
COPIES = "configs"  # in a run's folder: the config files as they were when the command began
_LONGEST_NAME = 200  # bytes; most file systems take 255
YAML = (".yaml", ".yml")
_PR_SET_PDEATHSIG = 1  # of Linux: see `man 2 prctl`
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


# --- folders ----------------------------------------------------------------------------------


@contextmanager
def output_folder(out: Path) -> Iterator[None]:
    """Make the folder of --out, and hold it against other processes that would write there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out: cannot make the folder {out}: {error.strerror}; name another"
        ) from error
    with locked(out, wait=False) as held:
        if not held:
            raise InputError(f"--out: another process is writing to {out}; wait for it")
        yield


def require_folder_names(option: str, names: Iterable[str]) -> None:
    """Raise InputError for a name that can be no folder's, or that cannot be shown."""
    for name in names:
        if not name.strip(".") or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
            raise InputError(f"{option}: {name!r} can be no folder's name; choose another")


def describe_inputs(arguments: Sequence[str], texts: Mapping[str, str]) -> str:
    """What determines the results, in JSON."""
    return json.dumps({"arguments": arguments, "configs": texts}, indent=2)


def require_same_inputs(folder: Path, inputs: str) -> None:
    """Raise InputError if `folder` holds results of other inputs."""
    noted = folder / INPUTS
    if noted.is_file() and noted.read_bytes() != inputs.encode():
        raise InputError(
            f"--out: {folder} holds a run with other arguments or another text of its config; "
            "name another folder, or remove that one"
        )


def note_inputs(folder: Path, inputs: str) -> None:
    with atomic_write(folder / INPUTS) as path:
        path.write_text(inputs, "utf-8")


# --- configs ----------------------------------------------------------------------------------


def config_texts(arguments: Sequence[str]) -> dict[str, str]:
    """The texts of the config files among arguments of hlbgpt, and of those that they name.

    Returns:
        Texts by their paths. What is not UTF-8 is kept in surrogates.
    """
    texts: dict[str, str] = {}
    left = [path for _, path in _config_paths(arguments)]
    while left:
        if (path := left.pop(0)) not in texts:
            texts[path] = Path(path).read_bytes().decode(errors="surrogateescape")
            inner = (os.path.join(os.path.dirname(path), name) for name in _names(texts[path]))
            left += filter(os.path.isfile, inner)
    return texts


def _config_paths(arguments: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Places and paths of the config files among `arguments`."""
    for k, word in enumerate(arguments):
        option, equals, value = word.partition("=")
        path = value if option.startswith("--") and equals else word
        named = option if equals else arguments[k - 1] if k else ""
        if named == "--config" and not os.path.isfile(path):
            raise InputError(f"--config: no file {path!r}; name a config file")
        if named == "--config" or (path.endswith(YAML) and os.path.isfile(path)):
            yield k, path


def _names(text: str) -> list[str]:
    """What may name another config file in the text of one."""
    try:
        events = list(yaml.parse(text))
    except yaml.YAMLError:
        return []  # the run will say what is wrong with it
    values = (event.value for event in events if isinstance(event, yaml.ScalarEvent))
    return [value for value in values if value.endswith(YAML)]


def copy_configs(arguments: Sequence[str], texts: Mapping[str, str], folder: Path) -> list[str]:
    """Write the texts of config files into `folder`; returns `arguments` that name the copies.

    Each copy lies as its file does below the root, since a config may name another one by a
    relative path.
    """
    for path, text in texts.items():
        copy = _copy_of(path, folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(text.encode(errors="surrogateescape"))
    words = list(arguments)
    for k, path in _config_paths(arguments):
        words[k] = f"{words[k].removesuffix(path)}{_copy_of(path, folder)}"
    return words


def _copy_of(path: str, folder: Path) -> Path:
    whole = Path(os.path.abspath(path))
    return folder / COPIES / whole.relative_to(whole.anchor)


# --- processes --------------------------------------------------------------------------------


def launch(
    words: list[str],
    log: Path,
    *,
    program: Sequence[str] = ("-m", "hlbgpt"),
    environment: dict[str, str] | None = None,
) -> int:
    """Run a program in its own process; an interrupt stops it gracefully. Returns the exit code.

    The process ends with this one, at once on Linux. It holds the lock of its log until it ends.

    Args:
        words: Arguments of the program.
        log: File to which its output is added.
        program: What Python runs.
        environment: Added to that of this process.
    """
    with log.open("ab") as file:
        _require_lock(file, log.parent)
        command, env = [sys.executable, *program, *words], os.environ | (environment or {})
        child = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=env, preexec_fn=ending_with_me()
        )
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise


def ending_with_me() -> Callable[[], None] | None:
    """What a new process calls so that it gets SIGTERM when this one dies; None but on Linux."""
    libc, parent = _LIBC, os.getpid()
    if libc is None:
        return None

    def end_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has died already
            os._exit(128 + signal.SIGTERM)

    return end_with_parent


def require_idle(folder: Path) -> None:
    """Raise InputError if a process works in `folder` that another benchmark has left there.

    Such a process has the log open, from its first moment on, and locks the folder when it trains.
    """
    if (log := folder / LOG).is_file():
        with log.open("ab") as file:
            _require_lock(file, folder)
    if folder.is_dir():
        with locked(folder, wait=False) as held:
            if not held:
                raise _busy(folder)


def _require_lock(file: BinaryIO, folder: Path) -> None:
    """Lock an open file for this process and for those that inherit it."""
    if sys.platform == "win32":
        return  # there a file that another process has open cannot be removed
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _busy(folder) from error
    except OSError:
        return  # no locks on this file system, as `locked` has said


def _busy(folder: Path) -> InputError:
    return InputError(
        f"--out: the run in {folder} is still going on in another process; wait for it or stop it "
        "first"
    )


def reason_of_failure(lines: Sequence[str], code: int) -> str:
    """The exit code of a process, and its last error message or else its last line."""
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if re.match(r"hlbgpt: error|[\w.]*(Error|Exception)\b", line)]
    reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return ": ".join([reason, *(errors or lines)[-1:]])
