"""Which settings can import code, tried out on all of them, and said in the README."""

import contextlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from test_readme import DOCUMENTS

from hlbgpt.cli.lightning_cli import CLI


def importing_settings() -> list[str]:
    """The settings that import what they name, as the README says."""
    (sentence,) = re.findall(
        r"These settings import what they name:(.*?)\.\n",
        DOCUMENTS["hlbgpt/runs/README.md"],
        re.DOTALL,
    )
    return re.findall(r"`([\w.]+)`", sentence)


def fit_parser(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The parser of `hlbgpt fit`, taken before it parses."""
    made: list[Any] = []

    def stop(cli: CLI, *_: Any, **__: Any) -> None:
        made.append(cli)
        raise InterruptedError

    monkeypatch.setattr(CLI, "parse_arguments", stop)
    with pytest.raises(InterruptedError):
        CLI(["fit"])
    return made[0].parser._subcommands_action.choices["fit"]


def test_the_readme_names_every_setting_that_can_import_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each is given a class of a module of its own, in each form that YAML knows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["hlbgpt"])
    parser, found = fit_parser(monkeypatch), set()
    keys = [action.dest for action in parser._actions if "help" not in action.dest]
    assert len(keys) > 60
    for number, key in enumerate(keys):
        name = f"module_of_a_stranger_{number}"
        Path(f"{name}.py").write_text(f"open('{name}.ran', 'w').close()\nclass Thing: ...\n")
        path = f"{name}.Thing"
        item = f'{{"class_path": "{path}"}}'
        for value in (path, item, f'["{path}"]', f"[{item}]"):
            with contextlib.suppress(SystemExit, Exception):
                parser.parse_args([f"--{key}={value}"])
        if Path(f"{name}.ran").exists():
            found.add(key)
        sys.modules.pop(name, None)
    assert found == set(importing_settings())
