"""The statistics of a benchmark against scipy and hand calculations, and its tables."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")
from benchmark_results import (
    BenchmarkRun,
    compare,
    estimate,
    markdown,
    mean_sd,
    summarize,
    summarize_variant,
    write,
)
from scipy import stats


def make_run(
    variant: str, seed: int, value: float, mode: str = "min", **figures: Any
) -> BenchmarkRun:
    record = {
        "monitor": "val_loss",
        "target": 3.8,
        "value": value,
        "value_step": 10,
        "step": 10,
        "tokens": 2_000_000,
        "train_seconds": 10.0,
        "reached": value <= 3.8,
        "seed": seed,
    }
    return BenchmarkRun(variant, seed, record=record | figures, mode=mode, max_steps=10)


def test_estimate_by_hand() -> None:
    # Mean 2, standard deviation 1, t of 97.5% at 2 degrees of freedom 4.302653 (any table).
    found = estimate([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert (found["n"], found["mean"], found["sd"]) == (3, 2.0, 1.0)
    assert (found["low"], found["high"]) == pytest.approx((2 - half, 2 + half), rel=1e-6)
    # With 2 degrees of freedom the distribution function of t is 1/2 + t / (2 sqrt(2 + t^2)).
    t = 2 * math.sqrt(3)
    assert found["p"] == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_statistics_against_scipy(n: int) -> None:
    random = np.random.default_rng(n)
    a = (3.79 + 0.01 * random.standard_normal(n)).tolist()
    b = (np.array(a) + 0.002 + 0.003 * random.standard_normal(n)).tolist()
    first = [make_run("a", i, v, train_seconds=10 + v) for i, v in enumerate(a)]
    other = [make_run("b", i, v, train_seconds=20 - v) for i, v in enumerate(b)]
    below = stats.ttest_1samp(a, 3.8, alternative="less").pvalue
    assert summarize_variant(first)["target_p"] == pytest.approx(below)
    found = compare(first, other[::-1])  # paired by seed, not by position
    paired = stats.ttest_rel(b, a)
    assert found["value_difference"]["p"] == pytest.approx(paired.pvalue)
    ends = tuple(found["value_difference"][end] for end in ("low", "high"))
    assert ends == pytest.approx(tuple(paired.confidence_interval(0.95)))
    ratios = [(20 - y) / (10 + x) for x, y in zip(a, b, strict=True)]
    sem = np.std(ratios, ddof=1) / math.sqrt(n)
    ends = tuple(found["train_seconds_ratio"][end] for end in ("mean", "low", "high"))
    by_t = stats.t.interval(0.95, n - 1, loc=np.mean(ratios), scale=sem)
    assert ends == pytest.approx((np.mean(ratios), *by_t))


def test_a_metric_that_shall_rise_is_tested_the_other_way() -> None:
    values = [3.9, 4.0, 4.2]
    runs = [make_run("a", seed, value, mode="max") for seed, value in enumerate(values)]
    above = stats.ttest_1samp(values, 3.8, alternative="greater").pvalue
    assert summarize_variant(runs)["target_p"] == pytest.approx(above)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [[], [3.7], [3.7, 3.7, 3.7], [0.1 + 0.2, 0.3]])
def test_what_is_undefined_is_none(values: list[float]) -> None:
    found = estimate(values, 3.8, "less")
    assert (found["low"], found["high"], found["p"]) == (None, None, None)
    assert found["sd"] == (0.0 if len(values) > 1 else None)
    assert (found["mean"] is None) == (not values)


@pytest.mark.filterwarnings("error")
def test_rounding_errors_of_differences_are_no_variance() -> None:
    first = [make_run("a", i, v) for i, v in enumerate([3.71, 3.83, 3.77])]
    other = [make_run("b", i, v + 0.1) for i, v in enumerate([3.71, 3.83, 3.77])]
    found = compare(first, other)["value_difference"]
    assert found["mean"] == pytest.approx(0.1)
    assert (found["sd"], found["p"]) == (0.0, None)


def test_tables_of_runs_with_gaps(tmp_path: Path) -> None:
    runs = [
        make_run("a", 0, 3.7, mfu=0.5, peak_memory_bytes=2e9),
        make_run("b", 0, 3.6, train_seconds=5.0, mfu=None),
        make_run("a", 1, 3.9, mfu=0.3, peak_memory_bytes=4e9),
        BenchmarkRun("b", 1, error="exit code 1: RuntimeError: out of memory"),
    ]
    found = summarize(runs, "the command")
    shown = markdown(found)
    (line,) = [line for line in shown.splitlines() if line.startswith("| a ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == ["2", "val_loss", "3.8000 ± 0.1414"]
    assert cells[4:7] == ["3.8", "0.5000", "2.000 ± 0.000"]
    assert cells[-2:] == ["0.4000 ± 0.1414", "3.00 ± 1.41"]
    assert found["variants"][1]["target_p"] is None  # the runs that did not fail are biased
    assert "| b       | 1     | -0.1000 " in shown
    assert "- b, seed 1: exit code 1: RuntimeError: out of memory" in shown
    assert "command: `the command`" in shown
    assert "nan" not in shown
    assert mean_sd({"mean": None, "sd": None}, ".2f") == "-"
    write(found, runs, tmp_path)
    assert (tmp_path / "results.md").read_text() == shown
    assert json.loads((tmp_path / "results.json").read_text()) == found
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["value"] for row in rows] == ["3.7", "3.6", "3.9", ""]
    assert rows[3]["error"].endswith("out of memory")


def test_runs_that_the_target_stopped_are_marked() -> None:
    early = [make_run("a", i, v, step=7, value_step=7) for i, v in enumerate([3.79, 3.78])]
    assert summarize_variant(early)["stopped_early"] == 2
    assert target_p_cell(markdown(summarize(early, ""))).endswith("*")
    late = [make_run("a", i, v) for i, v in enumerate([3.79, 3.78])]
    assert summarize_variant(late)["stopped_early"] == 0
    assert not target_p_cell(markdown(summarize(late, ""))).endswith("*")


def target_p_cell(text: str) -> str:
    """The cell of the p-value of the target in the first row."""
    (line,) = [line for line in text.splitlines() if line.startswith("| a ")]
    return line.split("|")[6].strip()
