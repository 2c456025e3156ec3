"""The record of a finished run, read from its file and checked."""

import json
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hlbgpt.runs.folder import RECORD
from hlbgpt.utils.errors import InputError

MAX_DEPTH = 20  # of nested lists and objects; a record needs four


class Kind(NamedTuple):
    """What a field may hold."""

    words: str
    fits: Callable[[Any], bool]


def _or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.words} or null", lambda found: found is None or kind.fits(found))


def _is_number(found: Any, least: float = -1e100) -> bool:
    most = 2**63 - 1 if type(found) is int else 1e100  # arrays hold no larger integers
    return type(found) in (int, float) and abs(found) <= most and found >= least


def _is_text(found: Any) -> bool:
    return isinstance(found, str) and found.isprintable()  # no line break, no half of a character


def _are_texts(found: Any) -> bool:
    return isinstance(found, list) and all(map(_is_text, found))


def _are_words(found: Any) -> bool:
    return isinstance(found, dict) and all(map(_is_text, found.values()))


BOOLEAN = Kind("true or false", lambda found: type(found) is bool)
MODE = Kind("min or max", lambda found: found in ("min", "max"))
TEXT = Kind("a line of text", _is_text)
NUMBER = Kind("a number", _is_number)
DURATION = Kind("a number from 0", lambda found: _is_number(found, 0))
COUNT = Kind("a whole number from 0", lambda found: type(found) is int and 0 <= found < 2**63)
SIZE = Kind("a whole number from 1", lambda found: COUNT.fits(found) and found > 0)

# What readers of records use; a dict holds the fields of an object, which may be null. There are
# more fields, which are not checked.
FIELDS: dict[str, Any] = {
    "reached": BOOLEAN,
    "monitor": TEXT,
    "mode": MODE,
    "target": _or_null(NUMBER),  # null if infinite
    "value": _or_null(NUMBER),  # null if not finite, or without a validation
    "validation": {
        "tokens": SIZE,
        "windows": SIZE,
        "sequence_length": SIZE,
        "split_tokens": SIZE,
        "fingerprint": TEXT,
        "complete": BOOLEAN,
    },
    "caveats": Kind("a list of texts", _are_texts),  # why it is not comparable with others
    "texts": {"train": Kind("a list of texts", _are_texts)},
    "step": COUNT,
    "tokens": COUNT,
    **dict.fromkeys(
        (
            "train_seconds",
            "data_seconds",
            "validation_seconds",
            "checkpoint_seconds",
            "compile_seconds",
            "wall_seconds",
        ),
        DURATION,
    ),
    "mfu": _or_null(NUMBER),
    "peak_memory_bytes": _or_null(COUNT),
    "seed": _or_null(COUNT),
    "device": TEXT,
    "torch": TEXT,
    "git_revision": _or_null(TEXT),
    "not_finite": Kind("an object of words", _are_words),  # what the nulls stand for
}
MAY_LACK = ("not_finite",)


def read_record(folder: Path) -> dict[str, Any]:
    """The figures of `record.json` in a run's folder.

    Raises:
        InputError: there is none, or it is broken or another program's.
    """
    path = folder / RECORD
    record = read_json(path)
    _check(record, FIELDS, path, "")
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


def _check(found: Mapping[str, Any], fields: Mapping[str, Any], path: Path, prefix: str) -> None:
    for name, kind in fields.items():
        key = f"{prefix}{name}"
        if name not in found:
            if key in MAY_LACK:
                continue
            raise InputError(f"{path}: has no {key}, so it is no record of a run; remove it")
        value = found[name]
        if isinstance(kind, Kind):
            if not kind.fits(value):
                raise InputError(
                    f"{path}: {key}: {reprlib.repr(value)} is not {kind.words}; restore or "
                    "remove the file"
                )
        elif isinstance(value, dict):
            _check(value, kind, path, f"{key}.")
        elif value is not None:
            raise InputError(
                f"{path}: {key}: {reprlib.repr(value)} is not an object or null; restore or "
                "remove the file"
            )
