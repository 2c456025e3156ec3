"""Print what a run will need: parameters, steps, tokens, FLOPs, memory and a range of times.

    python scripts/plan.py --config configs/speedrun.yaml --gpu A100

Takes the arguments of `hlbgpt fit`. Trains nothing, downloads nothing and needs no GPU.
"""

import argparse
from math import prod

from hlbgpt.planning import AUTO_TOKENS, Plan, plan_run
from hlbgpt.utils.hardware import GPU, GPUS, gpu_named, gpu_names

ASSUMPTIONS = f"""
Nothing here is measured. Times: 50% to 15% of a GPU's 16-bit peak, without compilation and
validation. Memory: without torch.compile. The plan is for one device, ignores callbacks that change
the shapes of steps, and takes `micro_batch_tokens: auto` as {AUTO_TOKENS:,}."""


def report(plan: Plan, gpus: list[GPU]) -> str:
    """The plan as text, with times on `gpus`."""
    parameters = sum(parameter.numel() for parameter in plan.net.parameters())
    lines = [f"{plan.name}: {type(plan.net).__name__}, {parameters:,} parameters"]
    lines += [f"{sum(plan.steps.values()):,} steps, {plan.tokens:,} tokens, {plan.flops:.3g} FLOPs"]
    lines += [f"\n{'length x windows x micro-batches':<34}{'steps':>9}{'tokens':>15}"]
    for shape, steps in plan.steps.items():
        text = " x ".join(f"{size:,}" for size in shape)
        lines.append(f"{text:<34}{steps:>9,}{prod(shape) * steps:>15,}")
    memory = {**plan.memory, "total": sum(plan.memory.values())}
    lines += ["\nmemory in GB", *(f"{name:<18}{memory[name] / 1e9:>8.3f}" for name in memory)]
    lines += [f"\n{'GPU':<16}{'training seconds':>18}  memory"]
    for gpu in gpus:
        times = " to ".join(f"{plan.flops / gpu.flops / mfu:,.0f}" for mfu in (0.5, 0.15))
        fits = "fits" if memory["total"] < gpu.memory else "does not fit"
        lines.append(f"{gpu.name:<16}{times:>18}  {gpu.memory / 1e9:.0f} GB, {fits}")
    return "\n".join([*lines, ASSUMPTIONS])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", help=f"one of {gpu_names()}; by default all of them")
    options, words = parser.parse_known_args()
    try:
        gpus = [gpu_named(options.gpu)] if options.gpu else list(GPUS)
        print(report(plan_run(words), gpus))
    except ValueError as error:
        parser.exit(2, f"plan.py: error: {error}\n")


if __name__ == "__main__":
    main()
