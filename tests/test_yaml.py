"""YAML of any origin: read as it is meant, or refused in one line and at once."""

import time
from pathlib import Path

import pytest
import yaml
from conftest import QUICKSTART

from hlbgpt.cli.main import build
from hlbgpt.runs.config import changed_settings, load_yaml, require_plain_yaml
from hlbgpt.utils.errors import InputError

# Ten values, then thirty lists of nine times the one before: 9 ** 30 values in a few lines.
NESTED_ALIASES = "a: &a0 [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)
CHAIN = "a: &a0 [x]\n" + "".join(f"b{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 1000))

FAULTS = {
    "a section twice": ("trainer: {a: 1}\ndata: 1\ntrainer: {b: 1}", "'trainer' stands at line 1"),
    "a key twice": ("a:\n  b: 1\n  c: 2\n  b: 1", "'b' stands at line 2 and again at line 4, and"),
    "twice in a list": ("- [{k: 1, k: 2}]", "'k' stands at line 1 and again at line 1, and only"),
    "twice in quotes": ("'k': 1\nk: 2", "'k' stands at line 1 and again at line 2"),
    "nested aliases": (NESTED_ALIASES, "line 6: its aliases stand for more than 100000 values"),
    "much after aliases": (NESTED_ALIASES + "# " * 80_000, "line 6: its aliases stand for more"),
    "a chain of aliases": (CHAIN, "line 100: nested deeper than 100 levels"),
    "an alias in itself": ("a: &a\n- 1\n- *a", "line 3: nested deeper than 100 levels, or in its"),
    "an unknown alias": ("a: *b", "no YAML at line 1, column 4: found undefined alias"),
    "deep lists": ("[" * 200 + "]" * 200, "line 1: nested deeper than 100 levels"),
    "very deep lists": ("[" * 100_000, "no YAML at line 1, column 1001: exceeded maximum nesting"),
    "very deep blocks": ("- " * 100_000, "nested deeper than 100"),
    "an open list": ("[", "no YAML at line 2, column 1: did not find"),
    "two documents": ("--- 1\n--- 2", "but found another document"),
    "a list as a key": ("? [a]\n: 1", "found unhashable key"),
    "code": ("!!python/object/apply:os.getcwd []", "could not determine a constructor for the tag"),
    "no number": ("!!int x", "no YAML: ValueError: invalid literal for int"),
    "no truth": ("!!bool x", "no YAML: KeyError: 'x'"),
    "no time": ("!!timestamp x", "no YAML: AttributeError: "),
    "no day": ("2001-99-99", "no YAML: ValueError: month must be in 1..12"),
    "a long number": ("9" * 5000, "no YAML: ValueError: Exceeds the limit"),
    "NUL": ("\0", "no YAML: unacceptable character #x0000"),
    "half a character": ("a: \ud800", "no YAML: 'utf-8' codec can't encode character"),
}


@pytest.mark.parametrize(("text", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_at_once(text: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(InputError) as error:
        load_yaml(text, "a.yaml")
    assert time.monotonic() - start < 1
    assert str(error.value).startswith("a.yaml: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "{a: 1, b: [1.5, null, x]}",
        "base: &b {x: 1, y: 1}\nmine: {<<: *b, y: 2}",  # an overridden key is no second one
        "a: {k: 1}\nb: {k: 1}",
        "- &a 1\n- *a\n- *a",
        "1: a\nx: b",
        "[" * 90 + "]" * 90,
        "- 1\n" * 9,
    ],
)
def test_plain_yaml_is_read_as_pyyaml_does(text: str) -> None:
    assert load_yaml(text, "a.yaml") == yaml.safe_load(text)


def test_a_long_table_is_no_huge_one() -> None:
    require_plain_yaml("x: &x [1]\ny: *x\nz:\n" + "- 1\n" * 101_000, "a.yaml")


TWICE = "class_path: hlbgpt.data.TextFiles\ninit_args:\n  folder: a\n  folder: b\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config=a.yaml"], "--config a.yaml: 'folder' stands at line 3 and again at line 4"),
        ([*QUICKSTART, "--data.source=a.yaml"], "key \"data.source\": YAML: 'folder' stands at"),
        ([*QUICKSTART, "--data={source: a.yaml}"], "key \"data.source\": YAML: 'folder' stands at"),
        ([*QUICKSTART, "--model.net.init_args={width: 16, width: 32}"], "'width' stands at line 1"),
        ([*QUICKSTART, f"--trainer.callbacks=[{'[' * 200}{']' * 200}]"], "nested deeper than 100"),
    ],
)
def test_what_the_parser_reads_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(TWICE)
    with pytest.raises(InputError) as error:
        build(words)
    assert message in str(error.value)


def test_a_text_that_looks_like_yaml_is_still_a_text() -> None:
    words = ["--data.prompts={a: 1, a: 2}", "--run_name={a: *b"]
    config = build([*QUICKSTART, *words]).config
    assert config.data.prompts == "{a: 1, a: 2}"
    assert config.run_name == "{a: *b"


def test_the_settings_in_a_checkpoint_are_no_bomb() -> None:
    with pytest.raises(InputError, match=r"^the checkpoint's settings: line 6: its aliases"):
        changed_settings(NESTED_ALIASES, "a: 1")
