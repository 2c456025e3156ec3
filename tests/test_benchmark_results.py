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
from test_read_record import changed


def make_run(variant: str, seed: int, value: float, **fields: Any) -> BenchmarkRun:
    return BenchmarkRun(variant, seed, record=changed(value=value, **fields))


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
    assert "- monitor: val_loss\n- mode: min\n- target: 3.8\n- device: cpu" in shown
    assert "- command: `the command`" in shown
    assert "nan" not in shown


UNLIKE: dict[str, tuple[dict[str, Any], str]] = {
    "monitor": ({"monitor": "val_accuracy"}, "monitor: val_loss, val_accuracy"),
    "mode": ({"mode": "max"}, "mode: min, max"),
    "target": ({"target": 3.5}, "target: 3.8, 3.5"),
    "text": ({"validation": {"fingerprint": "ffff"}}, "validation text: 0a1b2c3d, ffff"),
    "windows": (
        {"validation": {"sequence_length": 512}},
        "length of validation windows: 1024, 512",
    ),
    "part": (
        {"validation": {"complete": False, "tokens": 24_790}},
        "part of the validation split: all of it, 24,790 of 247,900 tokens",
    ),
}


@pytest.mark.parametrize(("fields", "words"), UNLIKE.values(), ids=UNLIKE)
def test_what_was_measured_otherwise_is_not_subtracted(fields: dict[str, Any], words: str) -> None:
    runs = [
        make_run(name, seed, 3.7 + seed, **more)
        for seed in range(2)
        for name, more in (("a", {}), ("b", fields), ("c", {}))
    ]
    results = summarize(runs, "the command")
    left_out, compared = results["comparisons"]
    assert words in left_out["left_out"]
    assert left_out["value_difference"]["n"] == left_out["train_seconds_ratio"]["n"] == 0
    assert compared["left_out"] is None
    assert compared["value_difference"]["n"] == 2
    (line,) = [line for line in markdown(results).splitlines() if "not compared" in line]
    assert line.startswith("- b: not compared, because they were not measured alike (")
    assert words in line


def test_seeds_measured_otherwise_have_no_p_of_the_target() -> None:
    """As when a text was changed while the benchmark ran."""
    other = {"validation": {"fingerprint": "ffff"}}
    runs = [make_run("a", 0, 3.7), make_run("a", 1, 3.72), make_run("a", 2, 3.71, **other)]
    found = summarize_variant(runs)
    assert found["target_p"] is None
    shown = markdown(summarize(runs, ""))
    assert "- a: its runs were not measured alike (validation text: 0a1b2c3d, ffff)" in shown
    assert summarize_variant(runs[:2])["target_p"] is not None


def test_a_part_of_the_split_is_no_record() -> None:
    part = {"complete": False, "tokens": 24_790}
    fields = {"validation": part, "caveats": ["validated on 10% of the split"]}
    runs = [make_run(name, seed, 3.7 + 0.1 * seed, **fields) for seed in range(2) for name in "ab"]
    results = summarize(runs, "")
    assert results["variants"][0]["target_p"] is None
    assert "- a: validated on 10% of the split, not a record" in markdown(results)
    assert results["comparisons"][0]["value_difference"]["n"] == 2  # all on the same part


def test_other_caveats_are_told_too() -> None:
    fields = {"caveats": ["trained on 2 texts, one after the other"]}
    runs = [make_run("a", seed, 3.7 + 0.1 * seed, **fields) for seed in range(2)]
    results = summarize(runs, "")
    assert results["variants"][0]["target_p"] is not None
    assert markdown(results).count("- a: trained on 2 texts, one after the other, not a rec") == 1


def test_the_open_track_is_named() -> None:
    runs = [make_run("a", 0, 3.7), make_run("b", 0, 3.7, counted_tokens=71_873_078)]
    notes = [each["notes"] for each in summarize(runs, "")["variants"]]
    assert notes == [[], ["n-grams of 71,873,078 tokens mixed in: the open track"]]


def test_odd_words_do_not_break_the_tables() -> None:
    shown = markdown(summarize([make_run("a|b", 0, 3.7), make_run("c", 0, 3.7)], ""))
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {9, 6}
    assert (
        summarize_variant([make_run("a", s, 3 + s, target=None) for s in (0, 1)])["target_p"]
        is None
    )
