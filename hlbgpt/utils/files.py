"""Paths that users type, locks between processes, and atomic writes."""

import contextlib
import errno
import glob
import json
import math
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hlbgpt.utils.errors import InputError

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_OLD = 24 * 3600  # seconds since a temporary file was written to
_KINDS = {
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def expand_path(path: str | Path, key: str) -> Path:
    """A path as a user typed it, with `~` and `~user` replaced.

    Raises InputError, which names `key`, for a user that is not known and for a NUL.
    """
    if "\0" in str(path):
        raise InputError(f"{key}: {str(path)!r} holds a NUL, which no path can; take it out")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{key}: {str(path)!r}: no user of this name has a home folder; write the path in full"
        ) from error


def require_regular(path: str | Path, key: str) -> os.stat_result:
    """The status of a file; raises InputError for a pipe or device, whose reading may not end.

    Raises:
        InputError: There is something else; the message names `key`.
        OSError: There is nothing at `path`.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise InputError(f"{key}: {str(path)!r} is {kind}, not a file; take it out, or name a file")
    return found


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold an exclusive lock on a folder; the system releases it if the process dies.

    Where the file system has no locks, a line says so and every process is let through.

    Args:
        folder: An existing folder, which gets a file `.lock`.
        wait: Whether to wait for a lock that another process holds.

    Yields:
        Whether this process holds the lock; always True with `wait`.
    """
    lock = FileLock(folder / ".lock", timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    except (NotImplementedError, OSError) as error:  # the former where filelock found ENOSYS
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        sys.stderr.write(f"{folder}: no file locks here; start only one process for this folder\n")
        yield True
        return
    try:
        yield True
    finally:
        lock.release()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file completely or not at all, even if the machine stops meanwhile.

    The block writes to the temporary file that it is given. If the block succeeds, that file is
    flushed to the disk and renamed to `path`; if it fails, the file is removed and `path` stays
    as it was. If several processes write to a path, the last one counts. Temporary files that
    killed processes left for `path` are removed first: those of this machine at once, those of
    others, which may share the folder without its locks, when they are a day old.

    Args:
        path: The file to write, in an existing folder.

    Yields:
        The temporary file, in the same folder. Its suffix is `.tmp`.

    Raises:
        OSError: The file cannot be written.
    """
    for other in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if _is_leftover(other):
            other.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened to flush the renaming
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _is_leftover(temporary: Path) -> bool:
    """Whether the process that wrote to this temporary file, NAME.HOST.PID.tmp, is gone."""
    with contextlib.suppress(FileNotFoundError):
        if time.time() - temporary.stat().st_mtime > _OLD:
            return True
    owner, _, number = temporary.stem.rpartition(".")
    if os.name != "posix" or not owner.endswith(f".{socket.gethostname()}") or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # of another user
        return False
    return int(number) == os.getpid()


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` as JSON, completely or not at all.

    JSON knows no NaN and no infinity. They become null, and `not_finite` lists which they were, as
    in `{"value": null, "not_finite": {"value": "nan"}}`.
    """
    words: dict[str, str] = {}
    values = _finite(values, "", words)
    if words:
        values["not_finite"] = words
    with atomic_write(path) as temporary:
        text = json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False)
        temporary.write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")


def _finite(value: Any, key: str, words: dict[str, str]) -> Any:
    """`value` with null for what is not finite, whose words are noted by their dotted keys."""
    if isinstance(value, float) and not math.isfinite(value):
        words[key] = str(value)
        return None
    if isinstance(value, dict):
        inner = f"{key}." if key else ""
        return {name: _finite(item, f"{inner}{name}", words) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item, f"{key}.{i}", words) for i, item in enumerate(value)]
    return value
