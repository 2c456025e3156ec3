"""Draw runs in one picture: validation loss, learning rate, and where the time went.

    python scripts/plot.py runs/quickstart/version_0 --out curves.png
    python scripts/plot.py runs/benchmark
    python scripts/plot.py before=runs/quickstart/version_0 after=runs/quickstart/version_1

Runs that differ in their random seed only share one line, the mean over seeds, with a band from
minimum to maximum and a thin line for each seed. An unfinished run is drawn as far as it got.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from run_curves import AXES, STEPS, TOKENS, Curve, RunCurves, band, find_runs, group_by_variant

from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import atomic_write

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    sys.exit("plot.py: error: matplotlib is not installed; pip install -e '.[plot]'")

FORMATS = (".png", ".svg", ".pdf")
DPI = 200
# Colours of Okabe and Ito; markers and dashes tell the lines apart without colour.
COLORS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
MARKERS = "os^Dv"
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
# Parts of a run's time: field of the record, grey level and hatch.
TIMES = {
    "training steps": ("train_seconds", "0.3", ""),
    "waiting for data": ("data_seconds", "1.0", "xxxx"),
    "validation": ("validation_seconds", "0.7", ""),
    "compilation": ("compile_seconds", "1.0", "////"),
    "checkpoints": ("checkpoint_seconds", "0.9", "...."),
    "rest": ("wall_seconds", "1.0", ""),
}

# hlb-gpt 0.4.0: million tokens and validation loss, mean over 25 seeds with a standard deviation
# of 0.02 to 0.04. Source: github.com/snimu/hlb-gpt-value-activation,
# results/results_25_tries_1000_steps_40Mparams.csv, rows with linear_value False. Each reading is
# a mean over 150 random windows of 1024 GPT-2 tokens, not over the whole validation split.
HLB_GPT = Curve(
    np.array([2.86, 4, 6, 8, 10, 15, 20, 25, 30, 35, 40, 45, 50, 60, 70]),
    np.array(
        [5.48, 5.31, 5.01, 4.78, 4.62, 4.38, 4.23, 4.13, 4.03, 3.94, 3.87, 3.81, 3.77, 3.72, 3.67]
    ),
)
HLB_GPT_SETTINGS = {
    "data.tokenizer": ("gpt2",),
    "data.eval_sequence_length": (1024,),
    "data.source.class_path": ("hlbgpt.data.HubText",),
    "data.source.init_args.path": ("Salesforce/wikitext",),
    "data.source.init_args.name": ("wikitext-103-raw-v1", None),
}


def compares_with_hlb_gpt(run: RunCurves) -> bool:
    """Whether the run's loss is measured like hlb-gpt's: WikiText-103, GPT-2 tokens, windows."""
    return all(run.settings.get(key) in values for key, values in HLB_GPT_SETTINGS.items())


def draw(groups: Mapping[str, Sequence[RunCurves]], *, hlb_gpt: bool) -> Figure:
    """Draw every group of runs, and hlb-gpt's published curve if `hlb_gpt`."""
    figure = Figure(figsize=(11, 6 + 0.3 * len(groups)), layout="constrained")
    panels = figure.subplot_mosaic([[*AXES], ["time", "time", "learning rate"]])
    for axis, axes in panels.items():
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xlabel=axis)
    for k, (label, runs) in enumerate(groups.items()):
        style = {
            "color": COLORS[k % len(COLORS)],
            "linestyle": DASHES[k % len(DASHES)],
            "marker": MARKERS[k % len(MARKERS)],
        }
        seeds = f"{len(runs)} seeds" if len(runs) > 1 else f"seed {runs[0].seed}"
        for axis in AXES:
            losses = [run.losses[axis] for run in runs]
            draw_losses(panels[axis], losses, style, label=f"{label}: {seeds}")
        draw_rates(panels["learning rate"], runs[0], style)
    finish_losses(panels, [run for runs in groups.values() for run in runs], hlb_gpt)
    draw_times(panels["time"], groups)
    handles = panels[TOKENS].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper left", ncols=2, frameon=False, handlelength=4)
    return figure


def draw_losses(axes: Any, curves: Sequence[Curve], style: Mapping[str, Any], label: str) -> None:
    """Draw the mean of `curves` with markers and, if there are several, each as a thin line."""
    x, mean, low, high = band(curves)
    if len(curves) > 1:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
        for curve in curves:
            axes.plot(*curve, color=style["color"], linewidth=0.5, alpha=0.6)
    axes.plot(x, mean, **style, markersize=4, markevery=max(1, len(x) // 10), label=label)


def draw_rates(axes: Any, run: RunCurves, style: Mapping[str, Any]) -> None:
    """Draw the learning rate of each parameter group, relative to its peak."""
    axes.set(xlabel="steps", ylabel="learning rate / peak", ylim=(0, 1.05))
    for rate in run.rates.values():
        if rate.y.any():
            axes.plot(rate.x, rate.y / rate.y.max(), color=style["color"], ls=style["linestyle"])


def finish_losses(panels: Mapping[str, Any], runs: Sequence[RunCurves], hlb_gpt: bool) -> None:
    """Add the targets and hlb-gpt's curve, and choose the range of the losses.

    The first tenth of each run does not count for the range: the loss falls so steeply there that
    later differences would not be visible.
    """
    targets = {run.target for run in runs} - {None}
    curves = [run.losses[TOKENS] for run in runs]
    shown = np.concatenate([y[x >= x[-1] / 10] for x, y in curves] + [list(targets)])
    shown = shown[np.isfinite(shown)]
    low, high = (shown.min(), shown.max()) if len(shown) else (0.0, 1.0)
    for axis in AXES:
        for target in targets:
            line = {"color": "0.4", "linestyle": "--", "linewidth": 1}
            panels[axis].axhline(target, **line, label=f"target {target:g}")
        panels[axis].set(xlim=(0, None), ylim=(low - 0.05, high + 0.05))
    panels[TOKENS].set_ylabel("validation loss (nats per token)")
    if hlb_gpt:
        end = max(50.0, *(x[-1] for x, _ in curves))  # it meets 3.8 just before 50 million tokens
        x, y = (values[end >= HLB_GPT.x] for values in HLB_GPT)
        label = "hlb-gpt 0.4.0, published: 25 seeds (github.com/snimu/hlb-gpt-value-activation)"
        panels[TOKENS].plot(x, y, color="0.5", marker="x", label=label)
        panels[TOKENS].set_xlim(0, 1.03 * end)


def time_parts(record: Mapping[str, Any]) -> list[float]:
    """Seconds of a finished run, in the order of `TIMES`."""
    train, data, *others, wall = (record.get(field, 0.0) for field, _, _ in TIMES.values())
    return [train - data, data, *others, max(0.0, wall - train - sum(others))]


def draw_times(axes: Any, groups: Mapping[str, Sequence[RunCurves]]) -> None:
    """Draw a bar for each group of finished runs: the mean time, divided into its parts."""
    finished = {label: runs for label, runs in groups.items() if runs[0].record}
    rows = range(len(finished))
    bottom = 0.5 + max(1.25 * len(rows), 2)  # room for the legend below the bars
    axes.set(xlabel="seconds of the process, mean over seeds", ylim=(bottom, -0.5))
    axes.set_yticks(rows, finished)
    left = np.zeros(len(rows))
    for k, (part, (_, grey, hatch)) in enumerate(TIMES.items()):
        times = [np.mean([time_parts(run.record)[k] for run in runs]) for runs in finished.values()]
        style = {"facecolor": grey, "hatch": hatch, "edgecolor": "black", "linewidth": 0.7}
        bars = axes.barh(rows, times, 0.5, left, label=part, **style)
        left += times
    axes.bar_label(bars, [f"{total:,.0f} s" for total in left], padding=3)
    axes.margins(x=0.1)
    axes.legend(loc="lower left", ncols=3, frameon=False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` to `path`; raises InputError if that is not possible."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"--out: {path} ends in none of {', '.join(FORMATS)}; rename it")
    try:
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=path.suffix.lower()[1:], dpi=DPI)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--out: cannot write {path}: {reason}; name another file") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FOLDER", help="a run, or many in it")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="PNG, SVG or PDF file")
    parser.add_argument(
        "--hlb-gpt",
        action=argparse.BooleanOptionalAction,
        help="draw hlb-gpt's published curve (default: if all runs are of WikiText-103 from the "
        "hub, with GPT-2's tokenizer and a data.eval_sequence_length of 1024)",
    )
    options = parser.parse_args(arguments)
    try:
        found = find_runs(options.runs)
        runs = [run for run in found if all(len(run.losses[axis].x) for axis in AXES)]
        if not runs:
            raise InputError(f"{found[0].folder}: no validation loss yet; wait for the first one")
        groups, hlb_gpt = group_by_variant(runs), options.hlb_gpt
        if hlb_gpt is None:
            hlb_gpt = all(map(compares_with_hlb_gpt, runs))
        save_figure(draw(groups, hlb_gpt=hlb_gpt), options.out)
    except InputError as error:
        sys.stderr.write(f"plot.py: error: {error}\n")
        return 2
    for label, group in groups.items():
        last = ", ".join(f"{run.losses[STEPS].y[-1]:.4f} (seed {run.seed})" for run in group)
        print(f"{label}: last val_loss {last}")
    for run in found:
        if run not in runs:
            print(f"not drawn: {run.folder} has no validation loss yet")
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
