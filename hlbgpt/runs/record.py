"""The record of a finished run, read from its file and checked."""

import json
import reprlib
from pathlib import Path
from typing import Any

from hlbgpt.runs.folder import RECORD
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.schema import AMOUNT, COUNT, FLAG, LINE, NUMBER, SIZE, Kind, find_fault

MAX_DEPTH = 20  # of nested lists and objects; a record needs four


_MODE = Kind("min or max", lambda found: found in ("min", "max"))
_WORDS = Kind(
    "an object of words",
    lambda found: isinstance(found, dict) and all(map(LINE.accepts, found.values())),
)

# What readers of records use; there are more fields, which are not checked.
FIELDS: dict[str, Any] = {
    "reached": FLAG,
    "monitor": LINE,
    "mode": _MODE,
    "target": (None, NUMBER),  # null if infinite
    "value": (None, NUMBER),  # null if not finite, or without a validation
    "validation": (
        None,
        {
            "tokens": SIZE,
            "windows": SIZE,
            "sequence_length": SIZE,
            "split_tokens": SIZE,
            "fingerprint": LINE,
            "complete": FLAG,
        },
    ),
    "caveats": [LINE],  # why it is not comparable with others
    "texts": {"train": [LINE]},
    "step": COUNT,
    "tokens": COUNT,
    "counted_tokens": COUNT,
    **{
        f"{name}_seconds": AMOUNT
        for name in ("train", "data", "validation", "checkpoint", "compile", "wall")
    },
    "mfu": (None, NUMBER),
    "peak_memory_bytes": (None, COUNT),
    "seed": (None, COUNT),
    "device": LINE,
    "torch": LINE,
    "git_revision": (None, LINE),
}
_NOT_FINITE = {"not_finite": _WORDS}  # what the nulls stand for; there only if there are any


def read_record(folder: Path) -> dict[str, Any]:
    """The figures of `record.json` in a run's folder.

    Raises:
        InputError: there is none, or it is broken or another program's.
    """
    path = folder / RECORD
    record = read_json(path)
    fields = FIELDS | (_NOT_FINITE if "not_finite" in record else {})
    if fault := find_fault(record, fields):
        raise InputError(f"{path}: {fault}, so it is no record of a run; restore or remove it")
    return record


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_bytes().decode(), parse_constant=_refuse)
        json.dumps(found, ensure_ascii=False).encode()  # fails for half a character
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # also of text that is not UTF-8
        raise InputError(f"{path}: is not JSON: {error}; restore or remove it") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds {reprlib.repr(found)}; restore or remove it")
    level: list[Any] = [found]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _items(outer)]
    if level:
        raise InputError(f"{path}: is nested deeper than {MAX_DEPTH} levels; restore or remove it")
    return found


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")
