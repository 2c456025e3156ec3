"""Say what a run will need before it is started: parameters, FLOPs, shapes, memory and time.

    python scripts/plan.py --config configs/speedrun.yaml --gpu A100

Takes the arguments of `hlbgpt fit`. Trains nothing, downloads nothing and needs no GPU: the network
has shapes but no memory. Times are estimates, ±25% at best.
"""

import argparse
import sys
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from hlbgpt.optim import parameter_groups
from hlbgpt.planning.estimates import EFFICIENCY
from hlbgpt.planning.plan import Plan, planned
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.hardware import CARDS, Card, card_named, known_cards


def report(plan: Plan, card: Card | None) -> str:
    """The plan as text, with times on `card`, or on each that is known."""
    return "\n".join(
        [*_network(plan), "", *_run(plan, card), "", *_memory(plan), "", *_times(plan, card)]
    )


def _network(plan: Plan) -> list[str]:
    groups = {g["name"]: sum(p.numel() for p in g["params"]) for g in parameter_groups(plan.net)}
    title = f"{plan.name}: {type(plan.net).__name__}, {plan.precision}, devices: {plan.devices}"
    rows = [f"  {name:<16}{number:>14,}" for name, number in groups.items()]
    return [title, "", f"{'parameters':<18}{sum(groups.values()):>14,}", *rows]


def _run(plan: Plan, card: Card | None) -> list[str]:
    validations = sum(step.validate for step in plan.steps)
    also = f", {validations} validations" if plan.scheduled else ""
    lines = [f"{plan.tokens:,} tokens in {len(plan.steps):,} steps{also}"]
    lines += [f"  {note}" for note in plan.notes]
    head = "length x windows  micro-batches  steps     tokens  MFLOP/token  GB kept"
    lines += ["", head + ("  ms/step  bound by" if card else "")]
    for shape, number in plan.shapes.items():
        tokens = shape.batch_size * shape.sequence_length * shape.micro_batches * plan.devices
        each = plan.net.flops_per_token(shape.sequence_length) / 1e6
        line = (
            f"{shape.sequence_length:>6} x {shape.batch_size:<7}  {shape.micro_batches:>13}  "
            f"{number:>5}  {number * tokens / 1e6:>8.2f}M  {each:>11.1f}  "
            f"{plan.kept[shape].kept / 1e9:>7.2f}"
        )
        if card:
            milliseconds = 1e3 * plan.step_seconds(shape, card)
            line += f"  {milliseconds:>7.1f}  {plan.costs[shape].bound(card)}"
        lines.append(line)
    mean = plan.flops * plan.devices / plan.tokens / 1e6
    return [*lines, f"mean: {mean:.1f} MFLOP/token, attention counted in full"]


def _memory(plan: Plan) -> list[str]:
    largest = max(plan.kept.values(), key=lambda kept: kept.peak)
    state = plan.fixed.optimizer
    rows = {
        "weights": (plan.fixed.weights, ""),
        "gradients": (plan.fixed.gradients, ""),
        "optimizer state": (state, "" if state is not None else "unknown for this class; left out"),
        "activations": (largest.kept, "estimate: kept for the backward pass, logits included"),
        "and a gradient": (largest.largest, "estimate: that of the largest activation"),
        "together": (plan.memory, "torch.compile needs less; CUDA itself takes about 0.5 more"),
    }
    lines = [
        f"  {name:<16}{(size or 0) / 1e9:>8.3f}  {remark}".rstrip()
        for name, (size, remark) in rows.items()
    ]
    return ["memory of each device at most, GB", *lines]


def _times(plan: Plan, card: Card | None) -> list[str]:
    lines = [
        "training time, an estimate, ±25% at best: without compilation, validation or waiting;",
        f"assumed are {EFFICIENCY:.0%} of the peak for matrix products, or all of the bandwidth",
        "",
        f"{'GPU':<16}{'seconds':>9}{'s/1M tokens':>13}{'MFU':>6}  memory",
    ]
    for each in [card] if card else CARDS:
        seconds = plan.seconds(each)
        fits = "fits" if plan.memory < each.memory else "too little: smaller micro-batches"
        lines.append(
            f"{each.name:<16}{seconds:>9.1f}{seconds / plan.tokens * 1e6:>13.2f}"
            f"{plan.flops / seconds / each.flops:>6.0%}  {each.memory / 1e9:.0f} GB, {fits}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="All other arguments are those of `hlbgpt fit`, such as --config.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", help=f"one of {known_cards()}; by default each")
    parser.add_argument("--picture", type=Path, help="draw the schedule: a .png or .svg file")
    options, words = parser.parse_known_args()
    sys.path.insert(0, str(Path.cwd()))  # classes of the current folder, as `hlbgpt` finds them
    try:
        card = card_named(options.gpu) if options.gpu else None
        plan = planned(words)
        print(report(plan, card))
        if options.picture:
            from plan_picture import draw

            draw(plan.steps if plan.scheduled else [], plan.devices, plan.name, options.picture)
    except (InputError, MisconfigurationException, OSError) as error:
        sys.stderr.write(f"plan.py: error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
