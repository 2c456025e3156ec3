"""The panels that scripts/plot.py draws, so that they can be told apart in black and white."""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np
import published
from plot_runs import (
    SECONDS,
    SEQUENCE_LENGTH,
    STEP_TOKENS,
    STEPS,
    TOKENS,
    Band,
    Curve,
    Group,
    band,
    beyond,
)

# Of each axis its label, and in how many of its units one of ours is.
_AXES = {
    TOKENS: ("million tokens", 1e-6),
    STEPS: ("steps", 1.0),
    SECONDS: ("seconds of training", 1.0),
}
# Okabe and Ito's colours, darkest and lightest in turn; for who sees none, markers and dashes.
_COLORS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (2.5, 1)))
_MOST_MARKERS = 12  # on a line
# Of what a run spends its time on: brightness and hatch.
_SPENT = {
    "step": ("0.25", ""),
    "data wait": ("1.0", "xxxx"),
    "validation": ("0.65", ""),
    "compile": ("1.0", "////"),
    "rest": ("1.0", ""),
}
_SMALL = 9  # points


class Style(NamedTuple):
    """How the lines of a group look."""

    color: str
    marker: str
    dashes: Any


def styles(number: int) -> list[Style]:
    """As many styles as are asked for; the first 7 * 8 * 5 differ."""
    each = zip(cycle(_COLORS), cycle(_MARKERS), cycle(_DASHES), strict=False)
    return [Style(*parts) for parts in islice(each, number)]


def inches(groups: Sequence[Group]) -> tuple[float, float]:
    """Width and height that the figure of `groups` needs."""
    return 9.0, 8.2 + 0.22 * ((len(groups) + 3) // 2) + 0.3 * max(0, len(groups) - 4)


def fill(figure: Any, groups: Sequence[Group], hlb_gpt: bool) -> None:
    """Draw loss, time and plan of `groups`, and what was published of hlb-gpt if so asked."""
    grid = figure.add_gridspec(3, 6, height_ratios=[1.25, 1.25, 0.8])
    by_tokens = figure.add_subplot(grid[0, :3])
    panels = {
        TOKENS: by_tokens,
        STEPS: figure.add_subplot(grid[0, 3:], sharey=by_tokens),
        SECONDS: figure.add_subplot(grid[1, :3], sharey=by_tokens),
    }
    looks = styles(len(groups))
    for axis, axes in panels.items():
        for group, style in zip(groups, looks, strict=True):
            draw_loss(axes, group, axis, style)
        axes.set_title(f"validation loss by {axis}", loc="left")
        axes.set_xlabel(_AXES[axis][0])
        if axis != STEPS:  # on the left
            axes.set_ylabel("nats per token")
    for target in {run.target for group in groups for run in group.runs}:
        if target is not None:
            draw_target(panels, target)
    if hlb_gpt:
        draw_published(panels, groups)
    frame_losses(panels, groups)
    draw_time(figure.add_subplot(grid[1, 3:]), groups)
    plan = [figure.add_subplot(grid[2, 2 * k : 2 * k + 2]) for k in range(3)]
    draw_plan(plan, groups, looks)
    legend(figure, groups, looks, list(panels.values()))


# --- loss -------------------------------------------------------------------------------------


def draw_loss(axes: Any, group: Group, axis: str, style: Style) -> None:
    """Draw the losses of a group: their mean as a line, the validation loss with a band."""
    unit = _AXES[axis][1]
    training = _scaled(group.curves("train_loss", axis), unit)
    mean = band(training)
    axes.plot(mean.x, mean.mean, color=style.color, linewidth=0.6, alpha=0.35, gid="training")
    curves = _scaled(group.curves("val_loss", axis), unit)
    whole = band(curves)
    line = {"color": style.color, "linestyle": style.dashes}
    if len(curves) > 1:
        axes.fill_between(
            whole.x, whole.low, whole.high, color=style.color, alpha=0.22, linewidth=0
        )
        for curve in curves:
            axes.plot(*beyond(curve, whole), **line, linewidth=0.8, gid="beyond")
    axes.plot(
        whole.x,
        whole.mean,
        **line,
        linewidth=1.6,
        marker=style.marker,
        markersize=5,
        markeredgecolor="white",
        markeredgewidth=0.5,
        markevery=_markers(whole),
        label=group.name,
        gid="validation",
    )


def _scaled(curves: Sequence[Curve], unit: float) -> list[Curve]:
    return [Curve(curve.x * unit, curve.y) for curve in curves]


def _markers(whole: Band) -> list[int]:
    """Where on a line markers go: some, evenly, the last point among them."""
    number = min(len(whole.x), _MOST_MARKERS)
    return sorted({round(k) for k in np.linspace(len(whole.x) - 1, 0, number)}) if number else []


def draw_target(panels: dict[str, Any], target: float) -> None:
    """Draw a dashed line where the target is, named at its left end in the first panel."""
    for axes in panels.values():
        axes.axhline(target, color="0.3", linewidth=1.0, linestyle=(0, (6, 4)), gid="target")
    axes = panels[TOKENS]
    axes.annotate(
        f"target {target:g}",
        (0, target),
        xycoords=axes.get_yaxis_transform(),
        xytext=(4, 3),
        textcoords="offset points",
        fontsize=_SMALL,
    )


def draw_published(panels: dict[str, Any], groups: Sequence[Group]) -> None:
    """Draw hlb-gpt's curve by tokens; and its times, but only beside runs on the same device."""
    tokens, losses = np.array(published.CURVE).T
    longest = max(c.x[-1] for group in groups for c in group.curves("val_loss", TOKENS))
    met = tokens[losses <= published.TARGET][0]
    shown = tokens <= max(longest, met)
    panels[TOKENS].plot(
        tokens[shown] * _AXES[TOKENS][1],
        losses[shown],
        color="0.5",
        linewidth=1.2,
        marker="x",
        markersize=5,
        label=f"hlb-gpt {published.CURVE_VERSION}, published: mean of "
        f"{published.CURVE_SEEDS} seeds\n({published.CURVE_SOURCE})",
        gid="published",
    )
    devices = [(run.record or {}).get("device", "") for group in groups for run in group.runs]
    if not all(published.DEVICE in device for device in devices):
        return
    version, seconds = published.TIMES[-1]
    panels[SECONDS].plot(
        seconds,
        published.TARGET,
        color="0.5",
        linestyle="",
        marker="*",
        markersize=10,
        label=f"hlb-gpt {version}, published: about {seconds:.0f} s on one {published.DEVICE}\n"
        f"({published.README})",
        gid="published",
    )


def frame_losses(panels: dict[str, Any], groups: Sequence[Group]) -> None:
    """Fit the axis of losses to what follows the first twentieth of each run's tokens.

    What comes before falls so steeply that nothing else could be told apart.
    """
    seen: list[float] = [line.get_ydata()[0] for line in panels[TOKENS].lines if _is_target(line)]
    for group in groups:
        for x, y in group.curves("val_loss", TOKENS):
            seen += y[(x >= x[-1] / 20) & np.isfinite(y)].tolist()
    low, high = min(seen), max(seen)
    pad = 0.05 * (high - low) or 0.05
    panels[TOKENS].set_ylim(low - pad, high + pad)
    for axes in panels.values():
        axes.set_xlim(left=0)


def _is_target(line: Any) -> bool:
    return line.get_gid() == "target"


# --- time -------------------------------------------------------------------------------------


def draw_time(axes: Any, groups: Sequence[Group]) -> None:
    """Draw a bar for each group, with its name above it and its sum behind it."""
    spent = [group.seconds() for group in groups]
    widest = max((sum(each.values()) for each in spent if each), default=1.0)
    for row, (group, each) in enumerate(zip(groups, spent, strict=True)):
        name = group.name if each else f"{group.name}: no record"
        axes.text(0, row - 0.26, name, fontsize=_SMALL, va="bottom")
        if each:
            named = [part for part in each if row == _first(spent, part)]
            _draw_bar(axes, row, each, named)
            total = sum(each.values())
            axes.text(total + 0.01 * widest, row, f" {total:,.0f} s", fontsize=_SMALL, va="center")
    rows = max(3, len(groups))
    axes.set_ylim(rows - 0.4, -0.6 - 0.15 * (rows + 1))  # the legend is on top
    axes.set_xlim(0, 1.14 * widest)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_title("time", loc="left")
    axes.set_xlabel("seconds in all")
    if any(spent):
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(0, 1),
            borderpad=0,
            borderaxespad=0,
            ncols=len(_SPENT),
            fontsize=_SMALL,
            frameon=False,
            handlelength=1.2,
            handletextpad=0.5,
            columnspacing=1.0,
        )


def _draw_bar(axes: Any, row: int, spent: dict[str, float], named: Sequence[str]) -> None:
    """Draw a bar of parts one behind the other; those `named` go into the legend."""
    left = 0.0
    for part, seconds in spent.items():
        shade, hatch = _SPENT[part]
        axes.barh(
            row,
            seconds,
            left=left,
            height=0.42,
            facecolor=shade,
            hatch=hatch,
            edgecolor="black",
            linewidth=0.7,
            label=part if part in named else None,
        )
        left += seconds


def _first(spent: Sequence[dict[str, float] | None], part: str) -> int | None:
    """The first group that spent any time on `part`."""
    return next((k for k, each in enumerate(spent) if each and each[part] > 0), None)


# --- plan -------------------------------------------------------------------------------------


def draw_plan(panels: Sequence[Any], groups: Sequence[Group], looks: Sequence[Style]) -> None:
    """Draw learning rate, tokens a step and sequence length of every run by tokens.

    Each group's lines are thinner than those before, which so are seen where they are the same.
    """
    for k, (group, style) in enumerate(zip(groups, looks, strict=True)):
        width = 1.2 + 1.8 * (1 - (k + 1) / len(groups))
        line = {"color": style.color, "linestyle": style.dashes, "linewidth": width}
        for run in group.runs:
            for curve in relative(list(run.rates.values())):
                panels[0].plot(curve.x * 1e-6, curve.y, **line)
            for axes, tag in zip(panels[1:], (STEP_TOKENS, SEQUENCE_LENGTH), strict=True):
                if tag in run.shapes:
                    curve = run.shapes[tag]
                    axes.plot(curve.x * 1e-6, curve.y, **line, drawstyle="steps-pre")
    names = ("learning rate / its peak", "tokens a step", "sequence length")
    for axes, name in zip(panels, names, strict=True):
        axes.set_title(name, loc="left")
        axes.set_xlabel(_AXES[TOKENS][0])
        axes.set_xlim(left=0)
    panels[0].set_ylim(bottom=0)
    for axes in panels[1:]:
        doubling(axes)


def relative(rates: Sequence[Curve]) -> list[Curve]:
    """The learning rates of parameter groups over their peaks; those that are the same, once."""
    found: list[Curve] = []
    for rate in rates:
        if not len(rate.y) or not rate.y.max() > 0:
            continue
        mine = Curve(rate.x, rate.y / rate.y.max())
        if not any(
            len(mine.y) == len(other.y) and np.allclose(mine.y, other.y, atol=1e-3)
            for other in found
        ):
            found.append(mine)
    return found


def doubling(axes: Any) -> None:
    """A scale for whole numbers that double rather than grow, with the numbers in full."""
    values = np.unique(np.concatenate([[], *(line.get_ydata() for line in axes.lines)]))
    if not len(values):
        return
    axes.set_yscale("log", base=2)
    axes.set_ylim(values[0] / 1.5, values[-1] * 1.5)
    ticks = values if len(values) <= 4 else values[[0, -1]]
    axes.set_yticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()


# --- legend -----------------------------------------------------------------------------------


def legend(
    figure: Any, groups: Sequence[Group], looks: Sequence[Style], panels: Sequence[Any]
) -> None:
    """Name every line once, above all panels, and say what the band is."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for group, style in zip(groups, looks, strict=True):
        seeds = sorted(str(run.seed) for run in group.runs)
        which = f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
        handles.append(
            Line2D(
                [],
                [],
                color=style.color,
                linestyle=style.dashes,
                marker=style.marker,
                markersize=5,
                label=f"{group.name} ({which})",
            )
        )
    handles.append(Line2D([], [], color="0.6", linewidth=0.7, label="thin: training loss"))
    if any(len(group.runs) > 1 for group in groups):
        handles.append(
            Patch(facecolor="0.8", label="line: mean of the seeds; band: least to greatest")
        )
    lines = [line for axes in panels for line in axes.lines]
    handles += [line for line in lines if line.get_gid() == "published"]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=1 if len(handles) < 3 else 2,
        frameon=False,
        fontsize=_SMALL,
        handlelength=3.2,
    )
