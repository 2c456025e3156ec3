"""The schedule of a run as one picture, for `plan.py`."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from picture import draw as draw_picture

from hlbgpt.optim.schedules import Step
from hlbgpt.utils.errors import InputError


def draw(steps: Sequence[Step], devices: int, name: str, path: Path) -> None:
    """Draw `steps` over tokens into a PNG or SVG file, in black on white.

    Raises:
        InputError: without steps, for another kind of file, or where matplotlib is missing.
    """
    if not steps:
        raise InputError("--picture: without a schedule.table there is nothing to draw")
    draw_picture(
        "--picture", [path], (7.0, 5.6), lambda figure: _fill(figure, steps, devices, name)
    )


def _fill(figure: Any, steps: Sequence[Step], devices: int, name: str) -> None:
    ends = [(step.first_token + step.tokens(devices)) / 1e6 for step in steps]
    edges = [0.0, *ends]
    panels = figure.subplots(5, sharex=True, height_ratios=[1, 1, 1, 1, 0.25])
    _stairs(panels[0], "sequence length", [step.sequence_length for step in steps], edges)
    _stairs(panels[1], "tokens per step", [step.tokens(devices) for step in steps], edges)
    _line(panels[2], "factor of the learning rates", [step.lr for step in steps], edges)
    panels[2].set_ylim(bottom=0)
    _line(panels[3], "momentum of Muon", [step.momentum for step in steps], edges)
    validated = [end for end, step in zip(ends, steps, strict=True) if step.validate]
    panels[4].vlines(validated, 0, 1, color="black", linewidth=1.4, clip_on=False)
    panels[4].set_yticks([])
    panels[4].spines["left"].set_visible(False)
    _name(panels[4], f"validations: {len(validated)}")
    panels[4].set_xlabel("million tokens seen")
    panels[4].set_xlim(0, ends[-1])
    panels[4].locator_params(axis="x", nbins=10)
    changes = [step.first_token / 1e6 for before, step in pairwise(steps) if _differ(before, step)]
    for axes in panels[:4]:
        axes.tick_params(axis="x", length=0)
        for change in changes:
            axes.axvline(change, color="0.75", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    figure.suptitle(
        f"{name}: {ends[-1]:.1f}M tokens in {len(steps):,} steps", fontsize=11, fontweight="bold"
    )


def _differ(before: Step, after: Step) -> bool:
    """In shape: where a vertical line helps the eye from panel to panel."""
    return before[1:4] != after[1:4]


def _stairs(axes: Any, name: str, values: Sequence[int], edges: Sequence[float]) -> None:
    """Whole numbers that double rather than grow: on a logarithmic scale."""
    axes.stairs(values, edges, baseline=None, color="black", linewidth=1.8)
    axes.set_yscale("log", base=2)
    axes.set_ylim(min(values) / 1.5, max(values) * 1.5)
    levels = sorted(set(values))
    levels = levels if len(levels) <= 4 else [levels[0], levels[-1]]
    axes.set_yticks(levels, [f"{value:,}" for value in levels])
    axes.minorticks_off()
    _name(axes, name)


def _line(axes: Any, name: str, values: Sequence[float | None], edges: Sequence[float]) -> None:
    """Numbers in straight lines; None is where there is none."""
    if all(value is None for value in values):
        axes.set_yticks([])
        _name(axes, f"{name}: as the optimizer has it")
        return
    known = [float("nan") if value is None else value for value in values]
    middle = [(begin + end) / 2 for begin, end in pairwise(edges)]
    axes.plot(middle, known, color="black", linewidth=1.8, clip_on=False)
    axes.locator_params(axis="y", nbins=3)
    _name(axes, name)


def _name(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, pad=4)
