"""What a run shows: forecast, progress bar, plain lines, the table at the end."""

import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import QUICKSTART, RUN
from helpers import fit, read_record
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console as Terminal

import hlbgpt.callbacks.console as console
from hlbgpt.callbacks import Console, TimeToTarget
from hlbgpt.callbacks.eta import seconds_to_target


@given(
    start=st.floats(3, 12),
    slope=st.floats(0.05, 3),
    seconds=st.lists(st.floats(0.5, 500), min_size=2, max_size=9, unique_by=lambda s: round(s, 2)),
    rest=st.floats(1.01, 20),
    rises=st.booleans(),
)
def test_a_straight_line_over_log_time_is_found_exactly(
    start: float, slope: float, seconds: list[float], rest: float, rises: bool
) -> None:
    sign = 1 if rises else -1
    points = [(s, start + sign * slope * math.log(s)) for s in sorted(seconds)]
    last = points[-1][0]
    target = start + sign * slope * math.log(last * rest)
    assert seconds_to_target(points, target) == pytest.approx(last * (rest - 1), rel=1e-3)
    assert seconds_to_target(points, start + sign * slope * math.log(last * 1e20)) is None


def test_no_forecast_without_two_points_or_a_way_to_the_target() -> None:
    assert seconds_to_target([], 3.8) is None
    assert seconds_to_target([(10, 5.0)], 3.8) is None
    assert seconds_to_target([(0.0, 6.0), (10, 5.0)], 3.8) is None  # before a step
    assert seconds_to_target([(10, 5.0), (20, 5.0)], 3.8) is None
    assert seconds_to_target([(10, 5.0), (20, 5.5)], 3.8) is None


def test_the_forecast_of_a_run_is_told_until_its_end_is_nearer(tmp_path: Path) -> None:
    clock = TimeToTarget(target=4.0)
    clock.load_state_dict(
        {
            "train_seconds": 40.0,
            "data_seconds": 0.0,
            "validation_seconds": 0.0,
            "checkpoint_seconds": 0.0,
            "compile_seconds": 0.0,
            "wall_seconds": 0.0,
            "last_measurement": None,
            "values": [(20.0, 5.5), (40.0, 5.0)],  # half a nat with each doubling
        }
    )

    def eta(step: int, max_steps: int, max_tokens: int | None = None) -> str:
        trainer = SimpleNamespace(global_step=step, max_steps=max_steps)
        data = SimpleNamespace(max_tokens=max_tokens)
        return clock.eta(trainer, SimpleNamespace(tokens_seen=1000, data=data))  # type: ignore

    assert eta(100, -1) == "target in about 2 min"
    assert eta(100, 900) == "target in about 2 min"
    assert eta(100, 150) == "ends in about 20 s"
    assert eta(100, -1, 1500) == "ends in about 20 s"
    assert eta(100, 100) == ""


def test_plain_lines_on_a_pipe(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    now = iter(range(10_000))
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(now)))
    watched = TimeToTarget(target=0.1), Console(every_seconds=1)
    fit(folder, tmp_path, *watched, log_every_n_steps=1, enable_progress_bar=True)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "train_loss" in line]
    assert lines
    for line in lines:
        assert re.fullmatch(
            r"step +\d+  0\.00M tokens  train_loss \d\.\d{4}  [\d,]+ tokens/s  \S+ in about .*",
            line,
        )
    assert "\x1b" not in out  # nothing for terminals
    assert out.count("val_loss") == 5  # four validations, the last one also in the verdict


def test_the_bar_of_a_terminal_shows_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(console.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(
        console, "Terminal", lambda: Terminal(file=shown, force_terminal=True, width=160)
    )
    bar = Console()
    watched = TimeToTarget(target=0.1), bar
    fit(folder, tmp_path, *watched, log_every_n_steps=1, enable_progress_bar=True)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    assert "training" in text
    assert re.search(r"0\.00M tokens  train_loss \d\.\d{4}  [\d,]+ tokens/s", text)
    assert "target NOT met" in text  # printed above the bar
    assert bar._bar is None  # and the terminal given back


def test_the_table_at_the_end_is_the_record(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(folder, tmp_path, TimeToTarget(target=0.1), max_steps=2)
    record, out = read_record(tmp_path), capsys.readouterr().out
    rows = dict(re.findall(r"^ +([a-z ]+?)  +(\S.*?) *$", out, re.MULTILINE))
    waited = f"of which {record['data_seconds']:.1f} s waiting for data"
    assert rows["training"] == f"{record['train_seconds']:.1f} s, {waited}"
    assert rows["validation"] == f"{record['validation_seconds']:.1f} s"
    assert rows["in total"] == f"{record['wall_seconds']:.1f} s"
    assert rows["parameters"] == f"{record['parameters']:,}"
    assert rows["device"].startswith("1 x cpu")


@pytest.mark.parametrize(
    "arguments",
    [[], ["--trainer.enable_progress_bar=false"], ["--trainer.callbacks+=TQDMProgressBar"]],
    ids=str,
)
def test_a_bar_of_ones_own_takes_the_place_of_ours(
    hlbgpt: Callable[..., str], tiny: list[str], arguments: list[str], monkeypatch: Any
) -> None:
    begun = []
    monkeypatch.setattr(Console, "on_train_start", lambda *_: begun.append("ours"))
    hlbgpt("fit", *QUICKSTART, *tiny, *arguments)
    assert (RUN / "record.json").is_file()
    assert begun == ([] if arguments else ["ours"])
