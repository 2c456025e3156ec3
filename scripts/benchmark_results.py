"""Statistics over paired seeds, and result tables, for scripts/benchmark.py."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hlbgpt.utils.files import atomic_write

try:
    from scipy import stats
except ModuleNotFoundError:
    raise SystemExit(
        "benchmark.py: error: scipy is not installed; pip install -e '.[bench]'"
    ) from None

TIMES = ("train_seconds", "compile_seconds", "validation_seconds", "wall_seconds")
FIGURES = ("value", "tokens", *TIMES, "mfu", "peak_memory_bytes")
NONE = "-"
NOTES = f"""\
Means ± standard deviations over seeds. p of target: p-value of a one-sided t-test, small if the
mean of the final values meets the target. {NONE}: not measured or undefined (fewer than two runs,
no variance, or for p of target a failed run). \\*: runs stopped at the first validation that met
the target. That selects their final values, and the test assumes a fixed number of steps.
"""
Estimate = dict[str, Any]  # what `estimate` returns, as it is written to results.json


@dataclass(frozen=True)
class BenchmarkRun:
    """The result of one run.

    Attributes:
        variant: Name of the variant.
        seed: The random seed.
        folder: The run's folder.
        error: Why the run failed; None if it did not.
        record: The run's record.json; empty if the run failed.
        mode: Whether the monitored value shall fall ("min") or rise ("max") to the target.
        max_steps: The run's limit of steps; -1 for no limit.
    """

    variant: str
    seed: int
    folder: str = ""
    error: str | None = None
    record: dict[str, Any] = field(default_factory=dict)
    mode: str = "min"
    max_steps: int = -1

    @property
    def stopped_early(self) -> bool:
        """Whether the run stopped because a validation met the target."""
        steps = self.record.get("step", 0)
        return self.record.get("reached", False) and not 0 < self.max_steps <= steps

    def in_a_line(self) -> str:
        if self.error:
            return f"FAILED, {self.error}"
        met = "target met" if self.record["reached"] else "target not met"
        value = f"{self.record['monitor']} {self.record['value']:.4f}"
        return f"{value}, {met}, {self.record['train_seconds']:.1f} s of training"


def estimate(
    values: Sequence[float], null: float = 0.0, alternative: str = "two-sided", scale: float = 0.0
) -> Estimate:
    """Estimate the mean of a sample, with Student's t-test.

    Args:
        values: Independent samples.
        null: The mean under the null hypothesis.
        alternative: "two-sided", "less" or "greater"; the interval is always two-sided.
        scale: Size of the numbers that `values` are differences of. A standard deviation within
            their rounding errors counts as zero.

    Returns:
        n, mean, sd (standard deviation), low and high (ends of the 95% confidence interval) and p.
        What is undefined is None: everything but n and mean for fewer than two values; low, high
        and p without variance.
    """
    found: Estimate = dict.fromkeys(("n", "mean", "sd", "low", "high", "p"))
    found["n"] = len(values)
    if values:
        found["mean"] = fmean(values)
    if len(values) > 1:
        found["sd"] = stdev(values)
        if found["sd"] <= 1e-12 * max(scale, *map(abs, values)):
            return found | {"sd": 0.0}
        test = stats.ttest_1samp(values, null, alternative=alternative)
        low, high = stats.ttest_1samp(values, null).confidence_interval(0.95)
        found |= {"low": float(low), "high": float(high), "p": float(test.pvalue)}
    return found


def summarize_variant(runs: Sequence[BenchmarkRun]) -> dict[str, Any]:
    """Figures of one variant over its runs that did not fail.

    `target_p` is the p-value of a one-sided t-test: small if the mean of the final values meets
    the target. It is None if a run failed, because the other runs are a biased sample.
    """
    done = [run for run in runs if not run.error]
    record = done[0].record if done else {}
    target_p = None
    if len(done) == len(runs):
        alternative = "less" if done[0].mode == "min" else "greater"
        values = [run.record["value"] for run in done]
        target_p = estimate(values, record["target"], alternative)["p"]
    found = {name: [run.record.get(name) for run in done] for name in FIGURES}
    return {
        "variant": runs[0].variant,
        "runs": len(runs),
        "failed": len(runs) - len(done),
        "monitor": record.get("monitor"),
        "target": record.get("target"),
        "target_p": target_p,
        "stopped_early": sum(run.stopped_early for run in done),
        "figures": {
            name: estimate([value for value in values if value is not None])
            for name, values in found.items()
        },
    }


def compare(first: Sequence[BenchmarkRun], other: Sequence[BenchmarkRun]) -> dict[str, Any]:
    """Compare a variant with the first one over the seeds with which neither failed."""
    by_seed = {run.seed: run.record for run in first if not run.error}
    done = [run for run in other if not run.error and run.seed in by_seed]
    pairs = [(by_seed[run.seed], run.record) for run in done]

    def ratio(name: str) -> Estimate:
        return estimate([b[name] / a[name] for a, b in pairs if a[name]], null=1.0)

    differences = [b["value"] - a["value"] for a, b in pairs]
    scale = max((abs(record["value"]) for pair in pairs for record in pair), default=0.0)
    return {
        "variant": other[0].variant,
        "against": first[0].variant,
        "pairs": len(pairs),
        "value_difference": estimate(differences, scale=scale),
        "train_seconds_ratio": ratio("train_seconds"),
        "tokens_ratio": ratio("tokens"),
    }


def summarize(runs: Sequence[BenchmarkRun], command: str) -> dict[str, Any]:
    """All results, as in results.json; variants are in the order of their first runs."""
    groups: dict[str, list[BenchmarkRun]] = {}
    for run in runs:
        groups.setdefault(run.variant, []).append(run)
    first, *others = groups.values()
    machine = {
        key: sorted({str(run.record[key]) for run in runs if run.record.get(key)})
        for key in ("device", "torch", "git_revision")
    }
    return {
        "command": command,
        **machine,
        "variants": [summarize_variant(group) for group in groups.values()],
        "comparisons": [compare(first, other) for other in others],
        "runs": [asdict(run) for run in runs],
    }


# --- tables -----------------------------------------------------------------------------------


def number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def mean_sd(found: Estimate, form: str, unit: float = 1.0) -> str:
    """Mean ± standard deviation in multiples of `unit`."""
    if found["mean"] is None:
        return NONE
    sd = None if found["sd"] is None else found["sd"] / unit
    return f"{found['mean'] / unit:{form}} ± {number(sd, form)}"


def mean_interval(found: Estimate, form: str) -> str:
    """Mean [lower end, upper end of the confidence interval]."""
    if found["low"] is None:
        return number(found["mean"], form)
    return f"{found['mean']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"


def p_value(p: float | None) -> str:
    return NONE if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def table(rows: Iterable[dict[str, str]]) -> str:
    """A Markdown table with a column for each key, padded so that the source is readable."""
    rows = list(rows)
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [map(str.ljust, line, widths) for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _variant_row(found: dict[str, Any]) -> dict[str, str]:
    figures, n = found["figures"], found["runs"] - found["failed"]
    return {
        "variant": found["variant"],
        "n": f"{n} of {found['runs']}" if found["failed"] else str(n),
        "monitor": found["monitor"] or NONE,
        "final value": mean_sd(figures["value"], ".4f"),
        "target": number(found["target"], "g"),
        "p of target": p_value(found["target_p"]) + ("*" if found["stopped_early"] else ""),
        "tokens (M)": mean_sd(figures["tokens"], ".3f", 1e6),
        **{name: mean_sd(figures[name], ".2f") for name in TIMES},
        "MFU": mean_sd(figures["mfu"], ".4f"),
        "peak memory (GB)": mean_sd(figures["peak_memory_bytes"], ".2f", 1e9),
    }


def _comparison_row(found: dict[str, Any]) -> dict[str, str]:
    return {
        "variant": found["variant"],
        "pairs": str(found["pairs"]),
        "difference of the final value": mean_interval(found["value_difference"], "+.4f"),
        "p": p_value(found["value_difference"]["p"]),
        "ratio of train_seconds": mean_interval(found["train_seconds_ratio"], ".3f"),
        "ratio of tokens": mean_interval(found["tokens_ratio"], ".3f"),
    }


def markdown(found: dict[str, Any]) -> str:
    """The text of results.md."""
    parts = [
        "# Benchmark",
        f"- device: {', '.join(found['device']) or NONE}\n"
        f"- torch: {', '.join(found['torch']) or NONE}\n"
        f"- git revision: {', '.join(found['git_revision']) or NONE}\n"
        f"- command: `{found['command']}`",
        table(map(_variant_row, found["variants"])),
    ]
    if found["comparisons"]:
        parts += [
            f"## Compared with {found['comparisons'][0]['against']}",
            "Means over pairs of runs with the same seed, with 95% confidence intervals.",
            table(map(_comparison_row, found["comparisons"])),
        ]
    if failed := [run for run in found["runs"] if run["error"]]:
        lines = [f"- {run['variant']}, seed {run['seed']}: {run['error']}" for run in failed]
        parts += ["## Failed", "\n".join(lines)]
    return "\n\n".join([*parts, NOTES])


def write(found: dict[str, Any], runs: Sequence[BenchmarkRun], out: Path) -> None:
    """Write results.md, results.json, and results.csv with one row for each run."""
    more = ("value_step", "step", "reached", "target", "data_seconds", "parameters")
    with atomic_write(out / "results.md") as path:
        path.write_text(markdown(found), encoding="utf-8")
    with atomic_write(out / "results.json") as path:
        path.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")
    with (
        atomic_write(out / "results.csv") as path,
        path.open("w", newline="", encoding="utf-8") as file,
    ):
        columns = ("variant", "seed", "monitor", *FIGURES, *more, "error", "folder")
        rows = csv.DictWriter(file, columns, extrasaction="ignore")
        rows.writeheader()
        rows.writerows({**run.record, **asdict(run)} for run in runs)
