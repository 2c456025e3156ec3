"""Print what a run will need: steps, matrix products, memory traffic, memory and times.

    python scripts/plan.py --config configs/speedrun.yaml --gpu A100

Takes the arguments of `hlbgpt fit`. Trains nothing, downloads nothing and needs no GPU.
"""

import argparse
import sys
from math import prod

from hlbgpt.planning import AUTO_TOKENS, BANDWIDTH, PRODUCTS, Plan, plan_run
from hlbgpt.utils.command import command
from hlbgpt.utils.hardware import GPU, GPUS, gpu_named, gpu_names

PEAK, RATE = (" to ".join(f"{part:.0%}" for part in each) for each in (PRODUCTS, BANDWIDTH))
ASSUMPTIONS = f"""
Nothing here is measured. Products (of matrices, and attention) and memory traffic are counted from
the operations that a CPU would run, and their times add up. Assumed: {PEAK} of a GPU's peak,
{RATE} of its bandwidth (data sheets), and with `model.compile` fused elementwise operations.
The times leave out compilation, validation, data and waits for the CPU. Memory: without
torch.compile. The plan is for one device, ignores callbacks that change the shapes of steps, and
takes `micro_batch_tokens: auto` as {AUTO_TOKENS:,}."""


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
    memory = {**plan.memory, "total": sum(plan.memory.values())}
    lines += ["\nmemory in GB", *(f"{name:<18}{memory[name] / 1e9:>8.3f}" for name in memory)]
    lines += [f"\n{'GPU':<15}{'training seconds':>17}{'products':>15}{'traffic':>15}  memory"]
    for gpu in gpus:
        times = (" to ".join(map(_rounded, pair)) for pair in plan.seconds(gpu).values())
        fits = "fits" if memory["total"] < gpu.memory else "does not fit"
        row = "{:<15}{:>17}{:>15}{:>15}".format(gpu.name, *times)
        lines.append(f"{row}  {gpu.memory / 1e9:.0f} GB, {fits}")
    return "\n".join([*lines, ASSUMPTIONS])


def _rounded(seconds: float) -> str:
    return f"{float(f'{seconds:.2g}'):,g}"  # two digits: it is an estimate


@command("plan.py")
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", help=f"one of {gpu_names()}; by default all of them")
    options, words = parser.parse_known_args()
    gpus = [gpu_named(options.gpu)] if options.gpu else list(GPUS)
    print(report(plan_run(words), gpus))


if __name__ == "__main__":
    sys.exit(main())
