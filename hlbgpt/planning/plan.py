"""A run as its settings plan it, without training, data or a GPU."""

import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from hlbgpt.callbacks.token_schedule import TokenSchedule
from hlbgpt.cli.checks import require_readable_configs, require_sane
from hlbgpt.cli.main import CLI, RefusedError
from hlbgpt.models import Network
from hlbgpt.optim.schedules import Step, plan_steps
from hlbgpt.planning.estimates import (
    Activations,
    Cost,
    Fixed,
    activation_bytes,
    fixed_costs,
    micro_batch_cost,
)
from hlbgpt.runs.config import config_name
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.hardware import Card

_FULL = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
_MIXED = {"16": "16-mixed", "bf16": "bf16-mixed"}  # Lightning's short names


class Settings(CLI):
    """The command line of `hlbgpt fit`, up to building the network, on `device`."""

    device = "meta"  # no memory, no values

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        try:
            super().parse_arguments(parser, args)
        except RefusedError as error:
            raise InputError(error.message) from None

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def before_instantiate_classes(self) -> None:
        trainer = self.config[self.subcommand].trainer.clone()
        trainer.accelerator, trainer.default_root_dir = "cpu", None  # those of another machine
        require_sane(trainer)

    def instantiate_classes(self) -> None:
        with torch.device(self.device):
            self.config_init = self.parser.instantiate_classes(self.config)

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class Shape(NamedTuple):
    """Steps of one shape."""

    batch_size: int
    sequence_length: int
    micro_batches: int


@dataclass(frozen=True)
class Plan:
    """All that is told of a run.

    Attributes:
        steps: In order; `notes` says what they leave out.
        shapes: How many steps each shape has.
        kept: Of a micro-batch of each shape; `costs` likewise.
    """

    name: str
    net: Network
    precision: str
    devices: int
    steps: list[Step]
    scheduled: bool
    notes: list[str]
    shapes: dict[Shape, int]
    fixed: Fixed
    kept: dict[Shape, Activations]
    costs: dict[Shape, Cost]

    @property
    def tokens(self) -> int:
        return sum(step.tokens(self.devices) for step in self.steps)

    @property
    def flops(self) -> float:
        """Of the whole run on each device."""
        return sum(n * s.micro_batches * self.costs[s].flops for s, n in self.shapes.items())

    @property
    def memory(self) -> int:
        fixed = self.fixed.weights + self.fixed.gradients + (self.fixed.optimizer or 0)
        return fixed + max(kept.peak for kept in self.kept.values())

    def step_seconds(self, shape: Shape, card: Card) -> float:
        return shape.micro_batches * self.costs[shape].seconds(card) + self.fixed.seconds(card)

    def seconds(self, card: Card) -> float:
        return sum(number * self.step_seconds(s, card) for s, number in self.shapes.items())


def planned(words: list[str]) -> Plan:
    """The plan of `hlbgpt fit` with these arguments; raises InputError where there is none."""
    require_readable_configs(words)
    sys.argv = ["hlbgpt", "fit", *words]
    with ExitStack() as resources:
        settings = Settings(resources)
    config, built = settings.config["fit"], settings.config_init["fit"]
    net, precision = built.model.net, _precision(config.trainer.precision)
    if precision.endswith("-true"):
        net.to(_FULL.get(precision.removesuffix("-true"), torch.float32))
    devices = _devices(config.trainer)
    steps, notes = _steps(config, built.schedule, devices)
    _require_context(net, steps)
    if precision == "32-true":
        notes.append("trainer.precision is 32-true; times are for bf16 and too short")
    try:
        fixed = fixed_costs(net, built.model.optimizer)
    except (ValueError, TypeError) as error:
        raise InputError(f"model.optimizer: {error}; change its init_args") from error
    shapes = Counter(Shape(s.batch_size, s.sequence_length, s.micro_batches) for s in steps)
    kept = {s: activation_bytes(net, *s[:2], precision=precision) for s in shapes}
    costs = {s: micro_batch_cost(net, *s[:2], fixed=fixed, kept=kept[s]) for s in shapes}
    name, scheduled = config_name(config.get("config")), bool(built.schedule.table)
    return Plan(
        name, net, precision, devices, steps, scheduled, notes, dict(shapes), fixed, kept, costs
    )


def _precision(setting: object) -> str:
    name = "32" if setting is None else str(setting)
    return _MIXED.get(name, f"{name}-true" if name in ("32", "64") else name)


def _devices(trainer: Any) -> int:
    """Number of devices, as far as the settings say; `auto` counts as one."""
    devices = trainer.devices
    if isinstance(devices, str) and "," in devices:
        devices = devices.strip(",").split(",")
    number = len(devices) if isinstance(devices, list) else devices
    return max(1, int(number) if str(number).isdigit() else 1) * trainer.num_nodes


def _steps(config: Any, schedule: TokenSchedule, devices: int) -> tuple[list[Step], list[str]]:
    """All steps of the run, and what is to be said of them."""
    most, data = config.trainer.max_steps, config.data
    if schedule.table:
        size: Any = schedule.micro_batch_tokens
        notes = []
        if not isinstance(size, int):
            size = 16384
            notes.append(f"schedule.micro_batch_tokens is found on the GPU; here it is {size:,}")
        steps = plan_steps(schedule.table, micro_batch_tokens=size, world_size=devices)
        return steps[: most if most > 0 else None], notes
    if most < 1:
        raise InputError(
            f"trainer.max_steps: {most}, and no schedule.table: the run has no end to plan; set one"
        )
    length, windows = data.sequence_length, data.micro_batch_size
    micro_batches = config.trainer.accumulate_grad_batches
    step = Step(0, length, windows, micro_batches, 1.0, None, False)
    notes = ["no schedule.table: data.micro_batch_size x data.sequence_length at every step"]
    if names := [entry.class_path.split(".")[-1] for entry in config.trainer.callbacks or []]:
        notes.append(f"callbacks may change that: {', '.join(names)}")
    tokens = step.tokens(devices)
    return [step._replace(first_token=i * tokens) for i in range(most)], notes


def _require_context(net: Network, steps: Iterable[Step]) -> None:
    longest, context = max(step.sequence_length for step in steps), net.max_sequence_length
    if context is not None and longest > context:
        raise InputError(
            f"sequence_length: {longest} is longer than the network's context "
            f"(max_sequence_length {context}); lower it or give the network more"
        )
