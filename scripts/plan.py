"""Print what a run will need: steps, matrix products, memory traffic, memory and times.

    python scripts/plan.py --config configs/speedrun.yaml --gpu A100
    python scripts/plan.py --config configs/speedrun.yaml --gpu H100-SXM --depths 4,8,12,17,34
    python scripts/plan.py --config configs/speedrun.yaml --out plan.svg

Takes the arguments of `hlbgpt fit`. Trains nothing, downloads nothing and needs no GPU. With
`--depths`, a row for each `scale.depth`; with `--out`, a picture of the schedule's table.
"""

import argparse
import sys
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlbgpt.models import FastGPT
from hlbgpt.optim import parameter_groups
from hlbgpt.optim.schedules import StepPlan
from hlbgpt.planning import AUTO_TOKENS, BANDWIDTH, PRODUCTS, Plan, plan_run
from hlbgpt.utils.command import command
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.hardware import GPU, GPUS, gpu_named, gpu_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PEAK, RATE = (" to ".join(f"{part:.0%}" for part in each) for each in (PRODUCTS, BANDWIDTH))
_PRODUCTS = ("block_matrices", "lm_head")  # groups that matrix products compute with
ASSUMPTIONS = f"""
Nothing here is measured. Products (of matrices, and attention) and memory traffic are counted from
the operations that a CPU would run, and their times add up. Assumed: {PEAK} of a GPU's peak,
{RATE} of its bandwidth (data sheets), and with `model.compile` fused elementwise operations.
The times leave out compilation, validation, data and waits for the CPU. Memory: without
torch.compile; activations are gone when the update makes its temporary tensors. The plan is for one
device, ignores callbacks that change the shapes of steps, and takes `micro_batch_tokens: auto` as
{AUTO_TOKENS:,}."""


def report(plan: Plan, gpus: list[GPU]) -> str:
    """The plan as text, with times on `gpus`."""
    parameters, work = sum(parameter.numel() for parameter in plan.net.parameters()), plan.work
    lines = [
        f"{plan.name}: {type(plan.net).__name__}, {parameters:,} parameters",
        f"{sum(plan.steps.values()):,} steps, {plan.tokens:,} tokens",
        f"products: {work.flops:.3g} FLOPs of 16-bit numbers, {work.fp32_flops:.3g} of fp32",
        f"traffic: {work.fused:.3g} bytes with fused operations, {work.unfused:.3g} without",
        f"\n{'length x windows x micro-batches':<34}{'steps':>9}{'tokens':>15}",
    ]
    for shape, steps in plan.steps.items():
        text = " x ".join(f"{size:,}" for size in shape)
        lines.append(f"{text:<34} {steps:>8,} {prod(shape) * steps:>14,}")
    memory = {**plan.memory, "peak": plan.peak_memory}
    lines += ["\nmemory in GB", *(f"{name:<18}{memory[name] / 1e9:>8.3f}" for name in memory)]
    lines += [f"\n{'GPU':<15}{'training seconds':>19}{'products':>19}{'traffic':>19}  memory"]
    for gpu in gpus:
        times = (" to ".join(map(_rounded, pair)) for pair in plan.seconds(gpu).values())
        fits = "fits" if memory["peak"] < gpu.memory else "does not fit"
        row = "{:<15}{:>19}{:>19}{:>19}".format(gpu.name, *times)
        lines.append(f"{row}  {gpu.memory / 1e9:.0f} GB, {fits}")
    return "\n".join([*lines, ASSUMPTIONS])


def depths_report(plans: dict[int, Plan], gpu: GPU) -> str:
    """A row for the plan of each depth, with times on `gpu`."""
    columns = "{:>5}{:>7}{:>7}{:>16}{:>15}{:>17}{:>13}{:>11}{:>10}{:>20}".format
    titles = ("depth", "width", "heads", "parameters", "block + head", "tokens", "step tokens")
    lines = [columns(*titles, "memory GB", "FLOPs", f"{gpu.name} seconds")]
    for depth, plan in plans.items():
        net = plan.net
        assert isinstance(net, FastGPT)  # no other can be scaled
        width = net.embedding.embedding_dim
        sizes = {group["name"]: group["params"] for group in parameter_groups(net)}
        products = sum(p.numel() for name in _PRODUCTS for p in sizes[name])
        lines.append(
            columns(
                depth,
                width,
                width // net.rotary.cos.shape[-1],
                f"{sum(p.numel() for p in net.parameters()):,}",
                f"{products:,}",
                f"{plan.tokens:,}",
                f"{prod(list(plan.steps)[-1]):,}",
                f"{plan.peak_memory / 1e9:.1f}",
                f"{plan.work.flops + plan.work.fp32_flops:.2g}",
                " to ".join(map(_rounded, plan.seconds(gpu)["training seconds"])),
            )
        )
    return "\n".join([*lines, ASSUMPTIONS])


def draw(schedule: StepPlan) -> "Figure":
    """Draw what changes during a run by tokens, for white and for dark pages."""
    from matplotlib.figure import Figure
    from plot import COLORS_ON_ANY_PAGE, suit_any_page

    steps = list(schedule)
    millions = [step.first_token / 1e6 for step in steps]
    sizes: dict[str, list[Any]] = {
        "tokens of a step": [step.tokens() for step in steps],
        "sequence length": [step.sequence_length for step in steps],
    }
    factors: dict[str, list[Any]] = {
        "learning rate (factor)": [step.lr for step in steps],
        "Muon's momentum": [step.momentum for step in steps],
        "weight of the second loss": [step.vocab_loss for step in steps],
    }
    figure = Figure(figsize=(8, 4.5), layout="constrained", facecolor="none")
    above, below = figure.subplots(2, sharex=True)
    for axes, lines in ((above, sizes), (below, factors)):
        for color, (name, values) in zip(COLORS_ON_ANY_PAGE, lines.items(), strict=False):
            if None not in values:
                axes.step(millions, values, where="post", color=color, label=name)
        axes.legend(labelcolor="linecolor", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    shown = sorted({size for values in sizes.values() for size in values})
    above.set_yscale("log", base=2)
    above.set_yticks(shown, [f"{size:,}" for size in shown])
    below.set(xlabel="million tokens", xlim=(0, None), ylim=(0, None))
    for axes in (above, below):
        suit_any_page(axes)
    return figure


def _depths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--depths: {text!r} is no list of numbers; write 4,8,12") from None


def _rounded(seconds: float) -> str:
    return f"{float(f'{seconds:.2g}'):,g}"  # two digits: it is an estimate


def _report(words: list[str], gpus: list[GPU], out: Path | None) -> None:
    if out:
        from plot import require_format, save_figure  # which needs matplotlib

        require_format(out)
    plan = plan_run(words)
    if out and not plan.schedule:
        raise InputError("--out: the config has no schedule.table; there is nothing to draw")
    print(report(plan, gpus))
    if out:
        save_figure(draw(plan.schedule), out)
        print(f"written: {out}")


@command("plan.py")
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", help=f"one of {gpu_names()}; by default all of them")
    parser.add_argument("--depths", help="values of scale.depth, such as 4,8,12")
    parser.add_argument("--out", type=Path, help="PNG, SVG or PDF file: draw the schedule")
    options, words = parser.parse_known_args()
    gpus = [gpu_named(options.gpu)] if options.gpu else list(GPUS)
    if options.out and options.depths:
        parser.error("--out: draws one run; leave out --depths")
    if not options.depths:
        _report(words, gpus, options.out)
        return
    gpu = gpus[0] if options.gpu else gpu_named("H100-SXM")
    plans = {n: plan_run([*words, f"--scale.depth={n}"]) for n in _depths(options.depths)}
    print(depths_report(plans, gpu))


if __name__ == "__main__":
    sys.exit(main())
