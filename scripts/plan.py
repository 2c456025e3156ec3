"""Print what a run will need: parameters, shapes, tokens, FLOPs, memory and a range of times.

    python scripts/plan.py --config configs/speedrun.yaml --gpu A100

Takes the arguments of `hlbgpt fit`. Trains nothing, downloads nothing and needs no GPU.
"""

import argparse
from math import prod

from hlbgpt.optim import parameter_groups
from hlbgpt.planning import Plan, plan_run
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.hardware import GPU, GPUS, gpu_named, gpu_names


def report(plan: Plan, gpus: list[GPU]) -> str:
    """The plan as text, with times on `gpus`."""
    groups = {g["name"]: sum(p.numel() for p in g["params"]) for g in parameter_groups(plan.net)}
    lines = [f"{plan.name}: {type(plan.net).__name__}, {sum(groups.values()):,} parameters"]
    lines += [f"  {name:<17}{number:>12,}" for name, number in groups.items()]
    per_token, total = plan.flops / plan.tokens / 1e6, plan.flops / 1e12
    lines += ["", f"{sum(plan.steps.values()):,} steps, {plan.tokens:,} tokens"]
    lines += [f"{per_token:.1f} MFLOPs per token, {total:,.1f} TFLOPs in all"]
    lines += ["length x windows x micro-batches    steps         tokens  MFLOPs/token"]
    for shape, steps in plan.steps.items():
        text = " x ".join(f"{size:,}" for size in shape)
        each = plan.net.flops_per_token(shape.sequence_length) / 1e6
        tokens = plan.devices * prod(shape) * steps
        lines.append(f"  {text:<30}{steps:>9,}{tokens:>15,}{each:>14.1f}")
    lines += [f"note: {note}" for note in plan.notes]
    lines += ["", "memory of a device in GB (activations: estimate without torch.compile)"]
    memory = {**plan.memory, "total": sum(plan.memory.values())}
    lines += [f"  {name:<17}{size / 1e9:>9.3f}" for name, size in memory.items()]
    lines += ["", f"{'GPU':<16}{'training seconds':>18}  memory"]
    for gpu in gpus:
        times = " to ".join(f"{s:,.0f}" if s >= 20 else f"{s:.1f}" for s in plan.seconds(gpu))
        fits = "fits" if memory["total"] < gpu.memory else "does not fit"
        lines.append(f"{gpu.name:<16}{times:>18}  {gpu.memory / 1e9:.0f} GB, {fits}")
    lines += [
        "estimated, not measured: the larger of matrix products at 50% of the peak and memory"
    ]
    lines += ["traffic, to the sum of products at 30% and traffic; no compilation or validation"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="All other arguments are those of `hlbgpt fit`, such as --config.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", help=f"one of {gpu_names()}; by default all of them")
    options, words = parser.parse_known_args()
    try:
        gpus = [gpu_named(options.gpu)] if options.gpu else list(GPUS)
        print(report(plan_run(words), gpus))
    except InputError as error:
        parser.exit(2, f"plan.py: error: {error}\n")


if __name__ == "__main__":
    main()
