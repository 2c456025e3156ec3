"""Statistics over paired seeds, and result tables, for scripts/benchmark.py."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any

try:
    from scipy import stats
except ImportError:
    raise SystemExit("the package scipy is missing; run pip install -e '.[bench]'") from None

CONDITIONS = ("monitor", "mode", "target", "device", "torch", "git_revision")
TIMES = ("train_seconds", "compile_seconds", "wall_seconds")
FIGURES = ("value", "tokens", *TIMES)
NOTES = """\
Means ± standard deviations over seeds; differences and ratios of runs with the same seed, with 95%
confidence intervals. p of target: p-value of a one-sided t-test, small if the mean of the final
values meets the target; not given if a run failed or was not validated on the whole split. The test
assumes a fixed number of steps: it is too optimistic where runs stop once a validation meets the
target.
"""


@dataclass(frozen=True)
class BenchmarkRun:
    """The result of one run."""

    variant: str
    seed: int
    folder: str = ""
    error: str | None = None  # why the run failed; None if it did not
    record: dict[str, Any] = field(default_factory=dict)  # record.json; empty if the run failed

    def in_a_line(self) -> str:
        if self.error:
            return f"FAILED, {self.error}"
        value = f"{self.record['monitor']} {self.record['value']:.4f}"
        return f"{value} after {self.record['train_seconds']:.1f} s of training"


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and 95% confidence interval (Student's t) of independent samples.

    What too few values leave undefined is None.
    """
    n, mean = len(values), fmean(values) if values else None
    if n < 2 or mean is None:
        return {"n": n, "mean": mean, "sd": None, "low": None, "high": None}
    sd = stdev(values)
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return {"n": n, "mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def t_test(values: Sequence[float], null: float, alternative: str) -> float | None:
    """The p-value of Student's t-test of the mean against `null`; None where it is undefined."""
    if len(values) < 2 or stdev(values) <= 1e-12:  # rounding errors are no variance
        return None
    return float(stats.ttest_1samp(values, null, alternative=alternative).pvalue)


def measured(record: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same in two records, by its name in words, to compare their values."""
    validation = record["validation"]  # there is one, since there is a value
    return {
        "monitor": record["monitor"],
        "mode": record["mode"],
        "target": record["target"],
        "validation text": validation["fingerprint"],
        "length of validation windows": validation["sequence_length"],
        "part of the validation split": part_of_split(validation),
    }


def part_of_split(validation: dict[str, Any]) -> str:
    """How much of the validation split was measured, in words."""
    if validation["complete"]:
        return "all of it"
    return f"{validation['tokens']:,} of {validation['split_tokens']:,} tokens"


def unlike(runs: Iterable[BenchmarkRun]) -> list[str]:
    """In what runs were not measured alike, in words; empty if their values can be compared."""
    found = [measured(run.record) for run in runs if run.record]
    words = []
    for name in found[0] if found else ():
        values = dict.fromkeys(str(each[name]) for each in found)
        words += [f"{name}: {', '.join(values)}"] if len(values) > 1 else []
    return words


def summarize_variant(runs: Sequence[BenchmarkRun]) -> dict[str, Any]:
    """Figures of one variant over its runs that did not fail, and notes that qualify them."""
    done = [run for run in runs if not run.error]
    notes = [f"its runs were not measured alike ({words})" for words in unlike(done)]
    complete = not notes and all(run.record["validation"]["complete"] for run in done)
    caveats = dict.fromkeys(caveat for run in done for caveat in run.record["caveats"])
    notes += [f"{caveat}, not a record" for caveat in caveats]
    counted = {run.record["counted_tokens"] for run in done} - {0}
    notes += [f"n-grams of {tokens:,} tokens mixed in: the open track" for tokens in counted]
    target_p = None
    if len(done) == len(runs) and complete:  # the runs that did not fail are a biased sample
        alternative = "less" if done[0].record["mode"] == "min" else "greater"
        values, target = [run.record["value"] for run in done], done[0].record["target"]
        target_p = None if target is None else t_test(values, target, alternative)
    return {
        "variant": runs[0].variant,
        "runs": len(runs),
        "target_p": target_p,
        **{name: estimate([run.record[name] for run in done]) for name in FIGURES},
        "notes": notes,
    }


def compare(first: Sequence[BenchmarkRun], other: Sequence[BenchmarkRun]) -> dict[str, Any]:
    """Compare a variant with the first one over the seeds with which neither failed.

    Runs that were not measured alike are not compared; `left_out` says why, and is None otherwise.
    """
    by_seed = {run.seed: run.record for run in first if not run.error}
    reasons = unlike([*first, *other])
    done = [run for run in other if not run.error and run.seed in by_seed and not reasons]
    pairs = [(by_seed[run.seed], run.record) for run in done]
    differences = [b["value"] - a["value"] for a, b in pairs]
    ratios = [b["train_seconds"] / a["train_seconds"] for a, b in pairs if a["train_seconds"]]
    return {
        "variant": other[0].variant,
        "left_out": "; ".join(reasons) or None,
        "value_difference": estimate(differences),
        "p": t_test(differences, 0.0, "two-sided"),
        "train_seconds_ratio": estimate(ratios),
    }


def summarize(runs: Sequence[BenchmarkRun], command: str) -> dict[str, Any]:
    """All results, as in results.json; variants are in the order of their first runs."""
    groups: dict[str, list[BenchmarkRun]] = {}
    for run in runs:
        groups.setdefault(run.variant, []).append(run)
    first, *others = groups.values()
    records = [run.record for run in runs if run.record]
    return {
        "command": command,
        **{key: sorted({str(record[key]) for record in records}) for key in CONDITIONS},
        "variants": [summarize_variant(group) for group in groups.values()],
        "comparisons": [compare(first, other) for other in others],
        "runs": [asdict(run) for run in runs],
    }


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def mean_sd(found: dict[str, Any], form: str) -> str:
    return f"{number(found['mean'], form)} ± {number(found['sd'], form)}"


def mean_interval(found: dict[str, Any], form: str) -> str:
    mean, low, high = (number(found[key], form) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def table(rows: Iterable[dict[str, str]]) -> str:
    """A Markdown table with a column for each key."""
    rows = [{k: text.replace("|", "\\|") for k, text in row.items()} for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def variant_row(found: dict[str, Any]) -> dict[str, str]:
    return {
        "variant": found["variant"],
        "n": f"{found['value']['n']} of {found['runs']}",
        "final value": mean_sd(found["value"], ".4f"),
        "p of target": number(found["target_p"], ".2g"),
        "tokens": mean_sd(found["tokens"], ",.0f"),
        **{name: mean_sd(found[name], ".2f") for name in TIMES},
    }


def comparison_row(found: dict[str, Any]) -> dict[str, str]:
    return {
        "variant": found["variant"],
        "pairs": str(found["value_difference"]["n"]),
        "difference of the final value": mean_interval(found["value_difference"], "+.4f"),
        "p": number(found["p"], ".2g"),
        "ratio of train_seconds": mean_interval(found["train_seconds_ratio"], ".3f"),
    }


def markdown(results: dict[str, Any]) -> str:
    """The text of results.md."""
    conditions = [f"- {key}: {', '.join(results[key])}" for key in CONDITIONS]
    conditions += [f"- command: `{results['command']}`"]
    parts = ["# Benchmark", "\n".join(conditions), table(map(variant_row, results["variants"]))]
    parts += _list(
        f"{found['variant']}: {note}" for found in results["variants"] for note in found["notes"]
    )
    if results["comparisons"]:
        parts += [f"## Compared with {results['variants'][0]['variant']}"]
        if compared := [found for found in results["comparisons"] if not found["left_out"]]:
            parts += [table(map(comparison_row, compared))]
        parts += _list(
            f"{found['variant']}: not compared, because they were not measured alike "
            f"({found['left_out']})"
            for found in results["comparisons"]
            if found["left_out"]
        )
    if failed := [run for run in results["runs"] if run["error"]]:
        parts += ["## Failed"]
        parts += _list(f"{run['variant']}, seed {run['seed']}: {run['error']}" for run in failed)
    return "\n\n".join([*parts, NOTES])


def _list(items: Iterable[str]) -> list[str]:
    """A Markdown list as a part of a document; no part without items."""
    lines = [f"- {item}" for item in items]
    return ["\n".join(lines)] if lines else []
