"""What a file that others may have changed has to hold: one small check for all of them.

A schema is a dict of keys, which may stand beside others, with what each holds: a `Kind`, a schema,
a list `[x]` for any number of `x`, or a tuple `(None, x)` for `x` or nothing.
"""

import reprlib
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

_MAX_COUNT = 2**53  # of steps, tokens and the like: what a float holds exactly
_MAX_AMOUNT = 1e100  # of FLOPs, seconds


class Kind(NamedTuple):
    """A kind of value: how it is called, and which values are of it."""

    name: str
    accepts: Callable[[Any], bool]


def _is_number(value: Any, least: float = -_MAX_AMOUNT) -> bool:
    if type(value) is int:
        return least <= value < 2**63  # arrays hold no larger integers
    return type(value) is float and least <= value < _MAX_AMOUNT


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_COUNT


COUNT = Kind("a whole number from 0 on", _is_count)
SIZE = Kind("a whole number from 1 on", lambda value: _is_count(value) and value > 0)
AMOUNT = Kind("a finite number from 0 on", lambda value: _is_number(value, 0))
NUMBER = Kind("a finite number", _is_number)
FLAG = Kind("true or false", lambda value: type(value) is bool)
TEXT = Kind("a text", lambda value: isinstance(value, str))
# Without a line break or half a character.
LINE = Kind("a line of text", lambda value: isinstance(value, str) and value.isprintable())


def find_fault(value: Any, schema: Any, key: str = "") -> str | None:
    """What is wrong with a value, as in `step is -1, not a whole number from 0 on`.

    Args:
        value: The value.
        schema: What it has to be.
        key: Its dotted key.

    Returns:
        None if nothing is.
    """
    if isinstance(schema, Kind):
        return None if schema.accepts(value) else _wrong(key, value, schema.name)
    if isinstance(schema, tuple):
        return None if value is None else find_fault(value, schema[1], key)
    if isinstance(schema, list):
        if not isinstance(value, (list, tuple)):
            return _wrong(key, value, "a list")
        parts = ((f"{key}.{i}", item, schema[0]) for i, item in enumerate(value))
    elif not isinstance(value, dict):
        return _wrong(key, value, "a dict")
    else:
        start = f"{key}." if key else ""
        for name in schema:
            if name not in value:
                return f"{start}{name} is missing"
        parts = ((f"{start}{name}", value[name], kind) for name, kind in schema.items())
    faults = (find_fault(item, kind, name) for name, item, kind in parts)
    return next((fault for fault in faults if fault), None)


def _wrong(key: str, value: Any, kind: str) -> str:
    return f"{key} is {textwrap.shorten(reprlib.repr(value), 80)}, not {kind}"
