"""The report of scripts/gpu_report.py, Markdown and two pictures, from what its processes left."""

import glob
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from benchmark_results import table
from gpu_measure import MEASURED, PARTS
from jobs import LOG
from matplotlib.figure import Figure  # pip install -e '.[plot]'
from plot import SHORT_LABEL, draw, plain_text, save_figure, shown
from run_curves import read_run

from hlbgpt.runs.folder import RECORD
from hlbgpt.runs.record import read_json, read_record
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import atomic_write
from hlbgpt.utils.schema import AMOUNT

# What a process of each stage writes last: tables, or the record of a run.
RESULTS = dict.fromkeys(("hardware", "gradients", "steps"), MEASURED)
RESULTS |= dict.fromkeys(("start", "speedruns", "race"), RECORD)
CURVES, STEPS = "curves.png", "steps.png"
GREYS = ("0.35", "0.6", "0.85")  # of the parts of a step
LAST_LINES = 6  # shown of a process that failed
FIGURES = ("tokens", "train_seconds", "validation_seconds", "compile_seconds", "wall_seconds")
NOTES = """\
n is the number of calls, steps or runs behind a figure. One or two seeds are a reading, not a
record: a record takes at least ten, fixed beforehand (`scripts/benchmark.py`). With `--quick`,
speedruns make only a quarter of their steps. On a CPU the report shows that the command works, and
nothing about a GPU: driver, memory of the device and MFU are missing, and kernels are operators."""

Found = dict[str, dict[str, Any]]  # results of a stage by the names of their folders


def cell(value: Any) -> str:
    """A value as the text of a table's cell."""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, list):
        return " x ".join(map(cell, value))
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str("-" if value is None else value)


def formatted(caption: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table below its caption; nothing without rows."""
    cells = ({name: cell(value) for name, value in row.items()} for row in rows)
    return [f"{caption}:", table(cells)] if rows else []


def starts_table(found: Found) -> list[str]:
    """Clocks of short runs, whose losses mean nothing."""
    keys = ("compile_seconds", "wall_seconds")
    rows = [{"start": name} | {key: record[key] for key in keys} for name, record in found.items()]
    return formatted("Three steps with an empty compile cache, then with a filled one; n = 1", rows)


def runs_table(found: Found) -> list[str]:
    """The records of runs."""
    rows = [
        {"run": name, "seed": record["seed"], record["monitor"]: record["value"]}
        | {"target": record["target"], "met": record["reached"]}
        | {key.replace("_seconds", " s"): record[key] for key in FIGURES}
        | {"MFU": record["mfu"], "peak GB": (record["peak_memory_bytes"] or 0) / 1e9}
        for name, record in found.items()
    ]
    devices = sorted({record["device"] for record in found.values()})
    return formatted(f"n = {len(rows)} runs on {', '.join(devices)}", rows)


def race_result(found: Found, recipe: str, rival: str) -> str:
    """Ratios of training times over pairs of runs with one seed, as a sentence."""
    ratios = []
    for name, record in found.items():
        ours = found.get(name.replace(rival, recipe, 1), {})
        if name.startswith(f"{rival}_") and ours.get("reached"):
            ratios.append(ours["train_seconds"] / record["train_seconds"])
    each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    text = f"{each}; mean {fmean(ratios):.3f}" if ratios else "none"
    return (
        f"{recipe} trains until it has the loss that {rival} ended with. **Ratio of their "
        f"train_seconds, n = {len(ratios)} pairs: {text}.**"
    )


def read_result(path: Path) -> dict[str, Any] | None:
    """What a process has written last; None if it has not ended.

    Raises InputError if the file is broken, or another program's.
    """
    if not path.is_file():
        return None
    if path.name == RECORD:
        return read_record(path.parent)
    tables = read_json(path)
    if not all(map(_is_table, tables.values())):
        raise InputError(f"{path}: holds no tables; remove it, and it is measured again")
    if path.parents[1].name == "steps" and not _are_times(next(iter(tables.values()), [])):
        raise InputError(f"{path}: holds no times; remove it, and it is measured again")
    return tables


def _is_table(rows: Any) -> bool:
    return isinstance(rows, list) and all(isinstance(row, dict) for row in rows)


def _are_times(rows: list[dict[str, Any]]) -> bool:
    return all(AMOUNT.accepts(row.get(f"{part} ms")) for row in rows for part in PARTS)


def read_results(out: Path, stage: str) -> tuple[Found, list[Path]]:
    """The results of a stage in the order of its processes, and all logs."""
    logs = sorted((out / stage).glob(f"*/{LOG}"), key=lambda log: log.stat().st_mtime_ns)
    results = {log.parent.name: read_result(log.with_name(RESULTS[stage])) for log in logs}
    return {name: found for name, found in results.items() if found is not None}, logs


def section(out: Path, stage: str, recipe: str, rival: str) -> list[str]:
    """The part of the report about a stage: results, failures, commands."""
    found, logs = read_results(out, stage)
    parts, commands = [f"## {stage.capitalize()}"], []
    if not logs:
        return [*parts, f"Not run; `--only {stage}` runs it."]
    if found and RESULTS[stage] == RECORD:
        parts += [race_result(found, recipe, rival)] if stage == "race" else []
        parts += starts_table(found) if stage == "start" else runs_table(found)
    else:
        for name, tables in found.items():
            for caption, rows in tables.items():
                parts += formatted(f"**{name}**: {caption}", rows)
    for log in logs:
        command, *lines = log.read_text("utf-8", errors="replace").splitlines() or [""]
        commands += [command]
        if log.parent.name not in found:
            parts += [f"**{log.parent.name} failed or was stopped**; its last lines:"]
            parts += ["\n".join(["```text", *lines[-LAST_LINES:], "```"])]
    return [*parts, "\n".join(["```text", *commands, "```"])]


@plain_text
def draw_steps(found: Found) -> Figure:
    """Draw a bar of the milliseconds of a step at each shape, divided into its parts."""
    bars = {
        f"{name} {cell(row.get('windows x tokens'))}": row
        for name, tables in found.items()
        for row in next(iter(tables.values()), [])
    }
    figure = Figure(figsize=(9, 1.2 + 0.35 * len(bars)), layout="constrained")
    axes, rows, left = figure.subplots(), np.arange(len(bars)), np.zeros(len(bars))
    axes.set_yticks(rows, [shown(name, SHORT_LABEL) for name in bars])
    for part, grey in zip(PARTS, GREYS, strict=True):
        values = np.array([row[f"{part} ms"] for row in bars.values()])
        drawn = axes.barh(rows, values, 0.6, left, label=part, color=grey)
        left += values
    axes.bar_label(drawn, [f"{total:.1f}" for total in left], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel="ms of a step of one micro-batch, medians of its parts")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=len(PARTS), frameon=False)
    return figure


def draw_curves(out: Path, recipe: str, rival: str) -> Figure | None:
    """Draw the finished runs that have a validation loss; None if there are none."""
    groups = {}
    for stage, name in (("speedruns", recipe), ("race", rival), ("race", recipe)):
        records = out.glob(f"{stage}/{glob.escape(name)}_[0-9]*/{RECORD}")
        folders = [record.parent for record in sorted(records)]
        runs = [run for run in map(read_run, folders) if run.is_drawable]
        if runs:
            groups[f"{stage}: {name}"] = runs
    return draw(groups, hlb_gpt=False) if groups else None


def write_report(out: Path, recipe: str, rival: str, command: str) -> None:
    """Write OUT/report.md and its pictures from the results in OUT, whatever there is.

    Args:
        out: OUT, the folder of the report.
        recipe: Name of the config that is measured.
        rival: Name of the config that it races against.
        command: The command that writes the report.
    """
    parts = ["# GPU report", f"```text\n$ {command}\n```", NOTES]
    for stage in RESULTS:
        parts += section(out, stage, recipe, rival)
    timed, _ = read_results(out, "steps")
    steps, curves = draw_steps(timed) if timed else None, draw_curves(out, recipe, rival)
    parts += ["## Pictures"]
    for name, figure in {STEPS: steps, CURVES: curves}.items():
        if figure:
            save_figure(figure, out / name)
            parts += [f"![{name}]({name})"]
    with atomic_write(out / "report.md") as path:
        path.write_text("\n\n".join(parts) + "\n", "utf-8")
