"""What the runs of scripts/benchmark.py amount to: statistics over paired seeds, and tables."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

try:
    from scipy import stats
except ModuleNotFoundError:
    raise SystemExit("benchmark: error: needs scipy; pip install -e '.[bench]'") from None

NONE = "-"
TIMES = ("train_seconds", "compile_seconds", "validation_seconds", "wall_seconds")
FIGURES = ("value", "tokens", *TIMES, "mfu", "peak_memory_bytes", "seconds_per_million_tokens")


@dataclass(frozen=True)
class Run:
    """One run: its figures, or why there are none."""

    variant: str
    seed: int
    folder: str
    command: str
    resumed: int = 0  # how often
    error: str | None = None
    record: dict[str, Any] = field(default_factory=dict)  # record.json; empty if it failed
    mode: str = "min"  # whether the monitored value is to fall or to rise to the target
    max_steps: int = -1

    def figure(self, name: str) -> float | None:
        if name == "seconds_per_million_tokens":
            tokens = self.record.get("tokens")
            return self.record["train_seconds"] / tokens * 1e6 if tokens else None
        return self.record.get(name)

    @property
    def stopped_early(self) -> bool:
        """Whether a validation that met the target cut the run short."""
        steps = self.record.get("step", 0)
        return self.record.get("reached", False) and not 0 < self.max_steps <= steps


# --- statistics -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard deviation, 95% confidence interval, and the p-value of a t-test.

    What is undefined is None: all but the mean below two values, interval and p without spread.
    """

    n: int
    mean: float | None = None
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None


def estimate(
    values: Sequence[float], null: float = 0.0, alternative: str = "two-sided", scale: float = 0.0
) -> Estimate:
    """Estimate a mean; p is of the hypothesis that it is `null`, against `alternative`.

    `scale` is the size of the numbers that `values` are differences of: what spreads by less than
    their rounding does not spread. The interval is two-sided whatever the alternative.
    """
    n = len(values)
    if n < 2:
        return Estimate(n, fmean(values) if values else None)
    mean, sd = fmean(values), stdev(values)
    if sd <= 1e-12 * max(scale, *map(abs, values)):
        return Estimate(n, mean, 0.0)
    p = stats.ttest_1samp(values, null, alternative=alternative).pvalue
    low, high = stats.ttest_1samp(values, null).confidence_interval(0.95)
    return Estimate(n, mean, sd, float(low), float(high), float(p))


def summary(variant: str, runs: Sequence[Run]) -> dict[str, Any]:
    """The figures of a variant over those of its runs that did not fail.

    `target_p` is of a one-sided t-test: small if the mean final value meets the target. With a
    failed run it is None, for the others are no fair sample.
    """
    done = [run for run in runs if not run.error]
    figures = {name: estimate(_known(run.figure(name) for run in done)) for name in FIGURES}
    record = done[0].record if done else {}
    p = None
    if len(done) == len(runs):
        side = "less" if done[0].mode == "min" else "greater"
        p = estimate([run.record["value"] for run in done], record["target"], side).p
    return {
        "variant": variant,
        "runs": len(runs),
        "failed": len(runs) - len(done),
        "monitor": record.get("monitor"),
        "target": record.get("target"),
        "target_p": p,
        "stopped_early": sum(run.stopped_early for run in done),
        "figures": {name: asdict(found) for name, found in figures.items()},
    }


def comparison(first: Sequence[Run], other: Sequence[Run]) -> dict[str, Any]:
    """How a variant differs from the first, over the seeds with which both got to their end."""
    mine = {run.seed: run for run in first if not run.error}
    pairs = [(mine[run.seed], run) for run in other if not run.error and run.seed in mine]

    def ratio(name: str) -> dict[str, Any]:
        found = [(a.figure(name), b.figure(name)) for a, b in pairs]
        return asdict(estimate([b / a for a, b in found if a and b is not None], null=1.0))

    values = [(a.record["value"], b.record["value"]) for a, b in pairs]
    scale = max((abs(value) for pair in values for value in pair), default=0.0)
    return {
        "variant": other[0].variant,
        "against": first[0].variant,
        "pairs": len(pairs),
        "value_difference": asdict(estimate([b - a for a, b in values], scale=scale)),
        "train_seconds_ratio": ratio("train_seconds"),
        "tokens_ratio": ratio("tokens"),
    }


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def results(runs: Sequence[Run], command: str) -> dict[str, Any]:
    """Everything, as it is written to results.json. Variants are in the order of their runs."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.variant, []).append(run)
    first, *others = groups.values()
    return {
        "command": command,
        "devices": _distinct(runs, "device"),
        "torch": _distinct(runs, "torch"),
        "git_revisions": _distinct(runs, "git_revision"),
        "variants": [summary(variant, group) for variant, group in groups.items()],
        "comparisons": [comparison(first, other) for other in others],
        "runs": [asdict(run) for run in runs],
    }


def _distinct(runs: Sequence[Run], key: str) -> list[str]:
    return sorted({str(run.record[key]) for run in runs if run.record.get(key)})


# --- tables -----------------------------------------------------------------------------------


def number(value: float | None, shape: str = ".3f") -> str:
    return NONE if value is None else format(value, shape)


def spread(found: dict[str, Any], shape: str = ".2f", unit: float = 1.0) -> str:
    """A mean ± standard deviation, counted in `unit`."""
    if found["mean"] is None:
        return NONE
    sd = None if found["sd"] is None else found["sd"] / unit
    return f"{number(found['mean'] / unit, shape)} ± {number(sd, shape)}"


def interval(found: dict[str, Any], shape: str) -> str:
    """A mean with its confidence interval."""
    if found["low"] is None:
        return number(found["mean"], shape)
    return f"{found['mean']:{shape}} [{found['low']:{shape}}, {found['high']:{shape}}]"


def p_value(p: float | None) -> str:
    return NONE if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that is aligned for those who read it as it is."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    padded = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    rule = ["-" * width for width in widths]
    return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], rule, *padded[1:]])


def variants_table(variants: Sequence[dict[str, Any]]) -> str:
    monitors = {found["monitor"] for found in variants} - {None}
    loss = monitors.pop() if len(monitors) == 1 else "value"
    head = ["variant", "n", f"final {loss}", "target", "p of target", "tokens (M)", *TIMES]
    head += ["s per M tokens", "MFU", "peak memory (GB)"]
    return table(head, map(_variant_row, variants))


def _variant_row(found: dict[str, Any]) -> list[str]:
    figures = found["figures"]
    n = found["runs"] - found["failed"]
    return [
        found["variant"],
        f"{n} of {found['runs']}" if found["failed"] else str(n),
        spread(figures["value"], ".4f"),
        number(found["target"], "g"),
        p_value(found["target_p"]) + ("*" if found["stopped_early"] else ""),
        spread(figures["tokens"], ".3f", 1e6),
        *(spread(figures[name]) for name in TIMES),
        spread(figures["seconds_per_million_tokens"]),
        spread(figures["mfu"], ".4f"),
        spread(figures["peak_memory_bytes"], ".2f", 1e9),
    ]


def comparisons_table(comparisons: Sequence[dict[str, Any]]) -> str:
    head = ["variant", "pairs", "difference of the final value", "p"]
    head += ["ratio of train_seconds", "ratio of tokens"]
    rows = [
        [
            found["variant"],
            str(found["pairs"]),
            interval(found["value_difference"], "+.4f"),
            p_value(found["value_difference"]["p"]),
            interval(found["train_seconds_ratio"], ".3f"),
            interval(found["tokens_ratio"], ".3f"),
        ]
        for found in comparisons
    ]
    return table(head, rows)


def remarks(found: dict[str, Any]) -> list[str]:
    """What a reader of the tables must know to read them right."""
    lines = [
        "Means ± standard deviations over seeds. p of target: of a one-sided t-test, small if the "
        f"mean final value meets the target. {NONE}: not measured, or undefined (fewer than two "
        "runs, no spread, or for p of target a failed run)."
    ]
    if any(variant["stopped_early"] for variant in found["variants"]):
        lines.append(
            "\\* Runs stopped at the first validation that met the target, so their final values "
            "are selected by it; the test asks for a number of steps fixed beforehand."
        )
    records = [run["record"] for run in found["runs"] if run["record"]]
    if early := sum(record["value_step"] < record["step"] for record in records):
        lines.append(f"In {early} runs training went on after the last validation.")
    if resumed := sum(run["resumed"] > 0 for run in found["runs"]):
        lines.append(f"{resumed} runs were cut short and resumed.")
    return lines


def markdown(found: dict[str, Any]) -> str:
    """results.md."""
    parts = [
        "# Benchmark",
        f"- machine: {', '.join(found['devices']) or NONE}\n"
        f"- torch: {', '.join(found['torch']) or NONE}\n"
        f"- git revision: {', '.join(found['git_revisions']) or NONE}\n"
        f"- to get it again: `{found['command']}`",
        variants_table(found["variants"]),
    ]
    if found["comparisons"]:
        against = found["comparisons"][0]["against"]
        parts += [
            f"## Against {against}",
            "Same seeds in both; means over pairs with their 95% confidence intervals.",
            comparisons_table(found["comparisons"]),
        ]
    if failed := [run for run in found["runs"] if run["error"]]:
        lines = [f"- {run['variant']}, seed {run['seed']}: {run['error']}" for run in failed]
        parts += ["## Failed", "\n".join(lines)]
    return "\n\n".join([*parts, *remarks(found)]) + "\n"


def _csv_row(run: Run) -> dict[str, Any]:
    more = ("value_step", "step", "reached", "target", "data_seconds", "parameters")
    return {
        "variant": run.variant,
        "seed": run.seed,
        "monitor": run.record.get("monitor"),
        **{name: run.figure(name) for name in FIGURES},
        **{name: run.record.get(name) for name in more},
        "resumed": run.resumed,
        "error": run.error,
        "folder": run.folder,
    }


def write(found: dict[str, Any], runs: Sequence[Run], out: Path) -> None:
    """Write results.md, results.csv (a row for each run) and results.json."""
    (out / "results.md").write_text(markdown(found), encoding="utf-8")
    (out / "results.json").write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")
    with (out / "results.csv").open("w", newline="", encoding="utf-8") as file:
        lines = [_csv_row(run) for run in runs]
        rows = csv.DictWriter(file, fieldnames=list(lines[0]))
        rows.writeheader()
        rows.writerows(lines)
