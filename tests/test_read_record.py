"""A record is read whole, or its fault is named in one line."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from hlbgpt.runs.record import read_record
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import write_json

RECORD: dict[str, Any] = {
    "reached": True,
    "monitor": "val_loss",
    "target": 3.8,
    "mode": "min",
    "value": 3.79,
    "value_step": 500,
    "validation": {
        "tokens": 247_808,
        "windows": 242,
        "sequence_length": 1024,
        "split_tokens": 247_900,
        "fingerprint": "0a1b2c3d",
        "complete": True,
    },
    "caveats": [],
    "texts": {"train": ["01020304"]},
    "step": 500,
    "tokens": 2_000_000,
    "counted_tokens": 0,
    "train_seconds": 10.0,
    "data_seconds": 2.0,
    "validation_seconds": 3.0,
    "checkpoint_seconds": 0.5,
    "compile_seconds": 1.0,
    "wall_seconds": 20.0,
    "mfu": 0.4,
    "peak_memory_bytes": 10**9,
    "seed": 0,
    "device": "cpu",
    "torch": "2.8",
    "git_revision": None,
}


def changed(**fields: Any) -> dict[str, Any]:
    """A record with other fields; `validation` is merged into that of `RECORD`."""
    record = copy.deepcopy(RECORD)
    if fields.get("validation"):
        fields["validation"] = record["validation"] | fields["validation"]
    return record | fields


def write_record(folder: Path, **fields: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "record.json", changed(**fields))


def without(name: str) -> str:
    return json.dumps({key: value for key, value in RECORD.items() if key != name})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"seed": None, "mfu": None, "peak_memory_bytes": None, "git_revision": "abc-dirty"},
        {"value": float("nan"), "target": float("-inf")},  # null and a word
        {"validation": None, "value": None},
        {"mine": [{"a": 1}]},  # of another callback
    ],
    ids=["plain", "nulls", "not finite", "never validated", "a field more"],
)
def test_a_record_is_read(fields: dict[str, Any], tmp_path: Path) -> None:
    write_record(tmp_path, **fields)
    assert read_record(tmp_path) == json.loads((tmp_path / "record.json").read_text())


BROKEN: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "is not JSON: Expecting value"),
    "cut short": (json.dumps(RECORD)[:100], "is not JSON"),
    "not UTF-8": (b"\xff" + json.dumps(RECORD).encode(), "is not JSON: 'utf-8' codec"),
    "NUL bytes": (bytes(300), "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON: maximum recursion"),
    "fairly deep": ('{"a": ' * 50 + "1" + "}" * 50, "nested deeper than 20 levels"),
    "half a character": (r'{"mine": "\ud800"}', "is not JSON: 'utf-8' codec can't encode"),
    "a list": ("[1]", r"holds \[1\]"),
    "null": ("null", "holds None"),
    "foreign": ('{"version": 1}', "reached is missing, so it is no record of a run"),
    "NaN by hand": (json.dumps(changed(value=float("nan"))), "NaN is no number of JSON"),
    "1e999": (json.dumps(RECORD).replace("3.79", "1e999"), "value is inf, not a finite number"),
    "a long number": (json.dumps(RECORD).replace("3.79", "9" * 5000), "is not JSON|value is 999"),
    "no value": (without("value"), "value is missing"),
    "no wall_seconds": (without("wall_seconds"), "wall_seconds is missing"),
}
WRONG: dict[str, Any] = {
    "reached": "yes",
    "monitor": 3,
    "mode": "up",
    "target": "low",
    "value": "3.79",
    "step": 1.5,
    "tokens": -1,
    "counted_tokens": 0.5,
    "train_seconds": None,
    "compile_seconds": -0.5,
    "wall_seconds": 10**40,
    "mfu": {},
    "seed": True,
    "device": "two\nlines",
    "torch": None,
    "git_revision": 7,
    "validation": [],
    "caveats": "none",
    "texts": {"train": "wiki"},
    "not_finite": {"value": 1},
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_record_is_named(text: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InputError, match=message) as error:
        read_record(tmp_path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 300 + len(str(path))


@pytest.mark.parametrize("field", WRONG)
def test_a_field_of_a_wrong_type_is_named(field: str, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(json.dumps(RECORD | {field: WRONG[field]}))
    with pytest.raises(InputError, match=f"record.json: {field}\\S* is .*, not "):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("tokens", 0), ("complete", None), ("fingerprint", 5), ("windows", "many")]
)
def test_a_wrong_field_of_the_validation_is_named(field: str, value: Any, tmp_path: Path) -> None:
    write_record(tmp_path, validation={field: value})
    with pytest.raises(InputError, match=f"record.json: validation.{field} is {value!r}, not "):
        read_record(tmp_path)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"record\.json: cannot be read: No such file"):
        read_record(tmp_path)
    (tmp_path / "record.json").mkdir()
    with pytest.raises(InputError, match=r"record\.json: cannot be read: Is a directory"):
        read_record(tmp_path)
