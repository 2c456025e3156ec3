"""Draw runs in one picture: validation loss, learning rate, and where the time went.

    python scripts/plot.py runs/quickstart/version_0 --out curves.png
    python scripts/plot.py runs/benchmark
    python scripts/plot.py before=runs/quickstart/version_0 after=runs/quickstart/version_1
    python scripts/plot.py runs/benchmark --by tokens --out race.svg

Runs that differ in their random seed only share one line, the mean over seeds, with a band from
minimum to maximum and a thin line for each seed. An unfinished run is drawn as far as it got.
--by draws one panel with labels at its lines, to be read on a white and on a dark page.
--hlb-gpt suits runs of WikiText-103 with GPT-2's tokens and evaluation windows of 1024 tokens.
"""

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
except ImportError:
    raise SystemExit("the package matplotlib is missing; run pip install -e '.[plot]'") from None
from run_curves import (
    AXES,
    SECONDS,
    STEPS,
    TOKENS,
    Curve,
    RunCurves,
    band,
    find_runs,
    group_by_variant,
)

from hlbgpt.utils.command import command
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import atomic_write

# Colours of Okabe and Ito, which colour-blind people can tell apart.
COLORS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
# For white and for dark pages: the blue is lighter than theirs, and the text is grey.
COLORS_ON_ANY_PAGE, GREY = ("#D55E00", "#1F83C4", "#009E73", "#CC79A7"), "#787878"
FORMATS = (".png", ".svg", ".pdf")
MAX_GROUPS = 60  # of runs, each with its line in the legend
LONGEST_LABEL = 60  # characters
SHORT_LABEL = 32  # where a label takes its room from a panel
BY = {"tokens": TOKENS, "steps": STEPS, "seconds": SECONDS}
# Parts of a run's time by their grey level; what is left of `wall_seconds` is the rest.
TIMES = {"train": "0.3", "data": "0.85", "validation": "0.55", "compile": "0.7", "checkpoint": "0"}

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


# Names of folders may contain $, which is no mathematics.
plain_text = rc_context({"text.parse_math": False})


@plain_text
def draw(groups: Mapping[str, Sequence[RunCurves]], *, hlb_gpt: bool) -> Figure:
    """Draw every group of runs, and hlb-gpt's published curve if `hlb_gpt`."""
    figure = Figure(figsize=(11, 6 + 0.3 * len(groups)), layout="constrained")
    panels = figure.subplot_mosaic([[*AXES], ["time", "time", "learning rate"]])
    losses = {axis: panels[axis] for axis in AXES}
    every = [run for runs in groups.values() for run in runs]
    draw_losses(losses, groups, COLORS)
    targets = {target for run in every if (target := run.target) is not None}
    finish_losses(losses, every, targets, hlb_gpt)
    for k, runs in enumerate(groups.values()):
        for rate in runs[0].rates.values():  # of a parameter group, relative to its peak
            color = COLORS[k % len(COLORS)]
            panels["learning rate"].plot(rate.x, rate.y / (rate.y.max() or 1), color=color)
    panels["learning rate"].spines[["top", "right"]].set_visible(False)
    panels["learning rate"].set(xlabel="steps", ylabel="learning rate / peak", ylim=(0, 1.05))
    draw_times(panels["time"], groups)
    handles = panels[TOKENS].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper left", ncols=2, frameon=False)
    return figure


@plain_text
def draw_one(
    groups: Mapping[str, Sequence[RunCurves]], axis: str, *, hlb_gpt: bool, caption: str
) -> Figure:
    """Draw the losses by one of `AXES`, with the name and the last loss of each group at its line.

    The background is transparent and the text grey, for white and for dark pages. A target that no
    run has met is left out, so that the curves can fill the picture.
    """
    runs = [run for group in groups.values() for run in group]
    targets = {target for run in runs if (target := run.target) is not None}
    met = {
        target for target in targets if any((run.losses[axis].y <= target).any() for run in runs)
    }
    figure = Figure(figsize=(8, 4), layout="constrained", facecolor="none")
    axes = figure.subplots()
    draw_losses({axis: axes}, groups, COLORS_ON_ANY_PAGE)
    finish_losses({axis: axes}, runs, met, hlb_gpt)
    for line in axes.lines:
        if not (label := str(line.get_label())).startswith("_"):
            x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
            name = shown(label, SHORT_LABEL).strip()
            end = np.flatnonzero(np.isfinite(y))[-1]  # it may have diverged there
            axes.annotate(
                name if line.get_linestyle() == "--" else f"{name}\n{y[-1]:.2f}",
                (x[end], y[end]),
                xycoords=line.get_transform(),
                xytext=(8, -6),
                textcoords="offset points",
                color=line.get_color(),
                va="bottom",  # a loss falls, so there is room above its end
                annotation_clip=False,
            )
    suit_any_page(axes)
    figure.supxlabel(printable(caption), x=0.01, ha="left", fontsize="medium", color=GREY)
    return figure


def suit_any_page(axes: Any) -> None:
    """Make the background transparent and text and lines grey, for white and for dark pages."""
    axes.set_facecolor("none")
    axes.tick_params(color=GREY, labelcolor=GREY)
    axes.spines[:].set_color(GREY)
    axes.spines[["top", "right"]].set_visible(False)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(GREY)


def shown(label: str, longest: int = LONGEST_LABEL) -> str:
    """A label as it can be drawn: in a line, short, and not left out.

    Matplotlib leaves out what begins with an underscore.
    """
    text = printable(label)
    if len(text) > longest:
        half = longest // 2 - 1
        text = f"{text[:half]} … {text[-half:]}"
    return f" {text}" if text.startswith("_") else text


def printable(text: str) -> str:
    """`text` in a line, without the control characters that no SVG may contain."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def in_words(runs: Sequence[RunCurves]) -> str:
    """The seeds of a group of runs, for its label."""
    if len(runs) > 1:
        return f"{len(runs)} seeds"
    return "no seed" if runs[0].seed is None else f"seed {runs[0].seed}"


def draw_losses(
    panels: Mapping[str, Any], groups: Mapping[str, Sequence[RunCurves]], colors: Sequence[str]
) -> None:
    """Draw the losses of every group into `panels`, whose keys are some of `AXES`."""
    for axis, axes in panels.items():
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xlabel=axis)
        for k, (label, runs) in enumerate(groups.items()):
            color = colors[k % len(colors)]
            curves = [run.losses[axis] for run in runs]
            x, mean, low, high = band(curves)
            if not np.isfinite(mean).any():
                raise InputError(
                    f"{label}: its runs have no {axis} in common with finite losses; name them "
                    "apart, as A=FOLDER B=FOLDER"
                )
            text = f"{shown(label)}: {in_words(runs)}"
            axes.plot(x, mean, color=color, marker=".", label=text)
            if len(runs) > 1:
                axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
                for curve in curves:
                    faint = min(0.6, 6 / len(curves))
                    axes.plot(*curve, color=color, linewidth=0.5, alpha=faint)


def finish_losses(
    panels: Mapping[str, Any], runs: Sequence[RunCurves], targets: set[float], hlb_gpt: bool
) -> None:
    """Add `targets` and hlb-gpt's curve, and choose the range of the losses.

    The first tenth of each run does not count for the range: the loss falls so steeply there that
    later differences would not be visible.
    """
    curves = [run.losses[TOKENS] for run in runs]
    shown = np.concatenate([y[x >= x[-1] / 10] for x, y in curves] + [list(targets)])
    shown = shown[np.isfinite(shown)]
    low, high = (shown.min(), shown.max()) if len(shown) else (0.0, 1.0)
    for axes in panels.values():
        for target in targets:
            axes.axhline(target, color=GREY, linestyle="--", label=f"target {target:g}")
        axes.set(xlim=(0, None), ylim=(low - 0.05, high + 0.05))
    next(iter(panels.values())).set_ylabel("validation loss (nats per token)")
    if hlb_gpt and TOKENS in panels:
        panels[TOKENS].plot(*HLB_GPT, color="0.5", marker="x", label="hlb-gpt 0.4.0, 25 seeds")


def draw_times(axes: Any, groups: Mapping[str, Sequence[RunCurves]]) -> None:
    """Draw a bar for each group of finished runs: the mean time, divided into its parts."""
    finished = {label: runs for label, runs in groups.items() if runs[0].record}
    axes.set(xlabel="seconds of the process, mean over seeds")
    rows, left = np.arange(len(finished)), np.zeros(len(finished))
    axes.set_yticks(rows, [shown(label, SHORT_LABEL) for label in finished])
    seconds = {
        name: np.array(
            [np.mean([run.record[f"{name}_seconds"] for run in runs]) for runs in finished.values()]
        )
        for name in (*TIMES, "wall")
    }
    seconds["train"] = seconds["train"] - seconds["data"]  # it includes waiting for data
    seconds["rest"] = seconds.pop("wall") - sum(seconds.values())
    for name, values in seconds.items():
        bars = axes.barh(rows, values, 0.5, left, label=name, color=TIMES.get(name, "0.95"))
        left += values
    axes.bar_label(bars, [f"{total:,.0f} s" for total in left], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(seconds), frameon=False)


def require_format(path: Path) -> None:
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"--out: {path} does not end in {', '.join(FORMATS)}")


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` to `path`; raises InputError if that is not possible."""
    kind = path.suffix.lower()[1:]
    # Text stays text, and the same runs give the same file.
    same = dict.fromkeys(("Creator", "Date", "Format", "Type")) if kind == "svg" else None
    try:
        with (
            atomic_write(path) as temporary,
            rc_context({"svg.fonttype": "none", "svg.hashsalt": "hlbgpt"}),
            warnings.catch_warnings(),
        ):
            # What no font has is drawn as a box.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure.savefig(temporary, format=kind, dpi=200, metadata=same)
    except (OSError, ValueError) as error:
        raise InputError(f"--out: cannot write {path}: {error}; name another file") from error


def why_not_drawn(run: RunCurves) -> str:
    """Why a run has no curve, and what to do."""
    if len(run.losses[TOKENS].y):
        return "its validation losses are not finite; lower the learning rate"
    if run.record:
        return "its event files hold no validation loss; restore them, or log by RunLogger"
    return "no validation loss yet; wait for the first one"


@command("plot.py")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FOLDER", help="a run, or many in it")
    parser.add_argument("--out", type=Path, default="curves.png", help="PNG, SVG or PDF file")
    parser.add_argument("--by", choices=BY, help="draw one panel: losses by this")
    parser.add_argument("--caption", default="", help="a line below the panel of --by")
    parser.add_argument("--hlb-gpt", action="store_true", help="add hlb-gpt's published losses")
    options = parser.parse_args(arguments)
    if options.caption and not options.by:
        parser.error("--caption: stands below one panel; add --by tokens")
    require_format(options.out)
    found = find_runs(options.runs)
    runs = [run for run in found if run.is_drawable]
    if not runs:
        raise InputError(f"{found[0].folder}: {why_not_drawn(found[0])}")
    groups = group_by_variant(runs)
    if len(groups) > MAX_GROUPS:
        raise InputError(
            f"{len(groups)} groups of runs are too many for a picture (at most {MAX_GROUPS}); "
            "name fewer folders"
        )
    if options.by:
        axis, caption = BY[options.by], options.caption
        figure = draw_one(groups, axis, hlb_gpt=options.hlb_gpt, caption=caption)
    else:
        figure = draw(groups, hlb_gpt=options.hlb_gpt)
    save_figure(figure, options.out)
    if len(runs) < len(found):
        print(f"not drawn, without a finite validation loss: {len(found) - len(runs)}")
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
