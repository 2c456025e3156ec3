"""The statistics of a benchmark against scipy and by hand, and its tables."""

import math
from typing import Any

import numpy as np
import pytest
from benchmark_results import NONE, Run, comparison, estimate, markdown, results, spread, summary
from scipy import stats


def run_of(variant: str, seed: int, value: float, **figures: Any) -> Run:
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
    return Run(variant, seed, "", "", record=record | figures, max_steps=10)


def test_estimate_by_hand() -> None:
    # Mean 2, standard deviation 1, t of 97.5% at 2 degrees of freedom 4.302653 (any table).
    found = estimate([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert (found.n, found.mean, found.sd) == (3, 2.0, 1.0)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=1e-6)
    # With 2 degrees of freedom the distribution of t is 1/2 + t / (2 sqrt(2 + t^2)).
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_statistics_against_scipy(n: int) -> None:
    random = np.random.default_rng(n)
    a = (3.79 + 0.01 * random.standard_normal(n)).tolist()
    b = (np.array(a) + 0.002 + 0.003 * random.standard_normal(n)).tolist()
    first = [run_of("a", i, v, train_seconds=10 + v) for i, v in enumerate(a)]
    other = [run_of("b", i, v, train_seconds=20 - v) for i, v in enumerate(b)]
    below = stats.ttest_1samp(a, 3.8, alternative="less").pvalue
    assert summary("a", first)["target_p"] == pytest.approx(below)
    found = comparison(first, other[::-1])  # paired by seed, not by place
    paired = stats.ttest_rel(b, a)
    assert found["value_difference"]["p"] == pytest.approx(paired.pvalue)
    ends = tuple(found["value_difference"][end] for end in ("low", "high"))
    assert ends == pytest.approx(tuple(paired.confidence_interval(0.95)))
    ratios = [(20 - y) / (10 + x) for x, y in zip(a, b, strict=True)]
    sem = np.std(ratios, ddof=1) / math.sqrt(n)
    ends = tuple(found["train_seconds_ratio"][end] for end in ("mean", "low", "high"))
    by_t = stats.t.interval(0.95, n - 1, loc=np.mean(ratios), scale=sem)
    assert ends == pytest.approx((np.mean(ratios), *by_t))


def test_a_metric_that_rises_is_tested_the_other_way() -> None:
    runs = [
        Run("a", i, "", "", record=run_of("a", i, v).record, mode="max")
        for i, v in enumerate([3.9, 4.0, 4.2])
    ]
    above = stats.ttest_1samp([3.9, 4.0, 4.2], 3.8, alternative="greater").pvalue
    assert summary("a", runs)["target_p"] == pytest.approx(above)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [[], [3.7], [3.7, 3.7, 3.7], [0.1 + 0.2, 0.3]])
def test_what_is_undefined_is_no_number(values: list[float]) -> None:
    found = estimate(values, 3.8, "less")
    assert (found.low, found.high, found.p) == (None, None, None)
    assert found.sd == (0.0 if len(values) > 1 else None)
    assert (found.mean is None) == (not values)


@pytest.mark.filterwarnings("error")
def test_no_spread_in_differences_but_rounding() -> None:
    first = [run_of("a", i, v) for i, v in enumerate([3.71, 3.83, 3.77])]
    other = [run_of("b", i, v + 0.1) for i, v in enumerate([3.71, 3.83, 3.77])]
    found = comparison(first, other)["value_difference"]
    assert found["mean"] == pytest.approx(0.1)
    assert (found["sd"], found["p"]) == (0.0, None)


def test_table_of_runs_with_gaps() -> None:
    lost = Run("b", 1, "", "", error="exit code 1: RuntimeError: out of memory")
    runs = [
        run_of("a", 0, 3.7, mfu=0.5, peak_memory_bytes=2e9),
        run_of("b", 0, 3.6, train_seconds=5.0, mfu=None),
        run_of("a", 1, 3.9, mfu=0.3, peak_memory_bytes=4e9),
        lost,
    ]
    found = results(runs, "the command")
    shown = markdown(found)
    (line,) = [line for line in shown.splitlines() if line.startswith("| a ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:6] == ["2", "3.8000 ± 0.1414", "3.8", "0.5000", "2.000 ± 0.000"]
    assert cells[-3:] == ["5.00 ± 0.00", "0.4000 ± 0.1414", "3.00 ± 1.41"]
    assert found["variants"][1]["target_p"] is None  # a failed run is no fair sample's
    assert "| b       | 1     | -0.1000 " in shown
    assert "- b, seed 1: exit code 1: RuntimeError: out of memory" in shown
    assert "to get it again: `the command`" in shown
    assert "nan" not in shown
    assert spread({"mean": None, "sd": None}) == NONE


def test_runs_that_the_target_stopped_are_marked() -> None:
    runs = [run_of("a", i, v, step=7, value_step=7) for i, v in enumerate([3.79, 3.78])]
    assert "*" in markdown(results(runs, ""))
    late = [run_of("a", i, v, step=10, value_step=7) for i, v in enumerate([3.79, 3.78])]
    assert "In 2 runs training went on after the last validation." in markdown(results(late, ""))
