"""Locks between processes, and atomic writes."""

import contextlib
import glob
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


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
    except NotImplementedError:  # what filelock makes of ENOSYS
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
    as it was. Temporary files that killed processes left for `path` are removed first, so only
    one process at a time may write to a path.

    Args:
        path: The file to write, in an existing folder.

    Yields:
        The temporary file, in the same folder. Its suffix is `.tmp`.

    Raises:
        OSError: The file cannot be written.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
