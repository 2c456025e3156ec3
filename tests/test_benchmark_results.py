"""The statistics of a benchmark against scipy and hand calculations, and its tables."""

import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")
from benchmark_results import (
    BenchmarkRun,
    compare,
    estimate,
    markdown,
    summarize,
    summarize_variant,
    t_test,
)
from scipy import stats


def make_run(
    variant: str, seed: int, value: float, mode: str = "min", **figures: Any
) -> BenchmarkRun:
    record = {
        "monitor": "val_loss",
        "target": 3.8,
        "mode": mode,
        "value": value,
        "tokens": 2_000_000,
        "train_seconds": 10.0,
        "compile_seconds": 1.0,
        "wall_seconds": 15.0,
        "device": "cpu",
        "torch": "2.8",
        "git_revision": None,
    }
    return BenchmarkRun(variant, seed, record=record | figures)


def test_estimate_by_hand() -> None:
    # Mean 2, standard deviation 1, t of 97.5% at 2 degrees of freedom 4.302653 (any table).
    found = estimate([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert (found["n"], found["mean"], found["sd"]) == (3, 2.0, 1.0)
    assert (found["low"], found["high"]) == pytest.approx((2 - half, 2 + half), rel=1e-6)
    # With 2 degrees of freedom the distribution function of t is 1/2 + t / (2 sqrt(2 + t^2)).
    t = 2 * math.sqrt(3)
    p = t_test([1.0, 2.0, 3.0], 0.0, "two-sided")
    assert p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)


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
    assert found["p"] == pytest.approx(paired.pvalue)
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
def test_what_is_undefined_is_none() -> None:
    assert estimate([]) == {"n": 0, "mean": None, "sd": None, "low": None, "high": None}
    assert estimate([3.7]) == {"n": 1, "mean": 3.7, "sd": None, "low": None, "high": None}
    # The differences from 0.1 are rounding errors, which are no variance.
    differences = [v + 0.1 - v for v in (3.71, 3.83, 3.77)]
    for values in ([], [3.7], [3.7, 3.7, 3.7], differences):
        assert t_test(values, 3.8, "less") is None


def test_tables_of_runs_with_gaps() -> None:
    runs = [
        make_run("a", 0, 3.7),
        make_run("b", 0, 3.6, train_seconds=5.0),
        make_run("a", 1, 3.9),
        BenchmarkRun("b", 1, error="exit code 1: RuntimeError: out of memory"),
    ]
    results = summarize(runs, "the command")
    shown = markdown(results)
    rows = {line.split(" | ")[0]: line.split(" | ")[1:5] for line in shown.splitlines()[:14]}
    assert rows["| a"] == ["2 of 2", "3.8000 ± 0.1414", "0.5", "2,000,000 ± 0"]
    assert rows["| b"] == ["1 of 2", "3.6000 ± -", "-", "2,000,000 ± -"]
    assert "| b | 1 | -0.1000 [-, -] | - | 0.500 [-, -] |" in shown
    assert "- b, seed 1: exit code 1: RuntimeError: out of memory" in shown
    assert "- monitor: val_loss\n- target: 3.8\n- device: cpu" in shown
    assert "- command: `the command`" in shown
    assert "nan" not in shown
