"""Schedules as pure functions: the steps that a table describes, and hlb-gpt 0.4.1's power laws."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True)
class ScheduleRow:
    """A row of the schedule: the settings from a number of tokens on.

    `sequence_length`, `step_tokens` and `validate_every` hold until a later row sets them again.
    `lr` and `momentum` are interpolated linearly between the rows that set them. The last row
    marks the end of the run; its sequence length and step size are not used.

    Args:
        tokens: Tokens seen when this row begins.
        sequence_length: Predicted tokens of a training window.
        step_tokens: Tokens of an optimizer step on all devices, rounded to whole windows.
        lr: Factor of every group's learning rate.
        momentum: Muon's momentum.
        validate_every: Tokens between validations; 0 for none. A validation always follows the
            last step.
    """

    tokens: int
    sequence_length: int | None = None
    step_tokens: int | None = None
    lr: float | None = None
    momentum: float | None = None
    validate_every: int | None = None


class PlannedStep(NamedTuple):
    """An optimizer step of a schedule."""

    first_token: int  # tokens seen before the step, on all devices
    sequence_length: int  # predicted tokens of a window
    batch_size: int  # windows in a micro-batch, on each device
    micro_batches: int
    lr: float  # factor of every group's learning rate
    momentum: float | None  # Muon's; None to leave it unchanged
    validate: bool  # whether a validation follows

    def tokens(self, world_size: int = 1) -> int:
        """Predicted tokens of the step on all devices."""
        return self.sequence_length * self.batch_size * self.micro_batches * world_size


def check_table(table: Sequence[ScheduleRow]) -> None:
    """Raise ValueError for a table from which no run can be planned."""
    if len(table) < 2:
        raise ValueError(f"{len(table)} rows; give at least a first row and the end of the run")
    if table[0].tokens != 0:
        raise ValueError(f"the first row begins at {table[0].tokens} tokens; set it to 0")
    if not (table[0].sequence_length and table[0].step_tokens):
        raise ValueError("the first row lacks sequence_length or step_tokens; set both")
    for above, below in itertools.pairwise(table):
        if below.tokens <= above.tokens:
            raise ValueError(
                f"a row at {below.tokens} tokens follows one at {above.tokens}; sort the rows"
            )
    smallest = {"sequence_length": 1, "step_tokens": 1, "lr": 0, "momentum": 0, "validate_every": 0}
    for row, (column, least) in itertools.product(table, smallest.items()):
        value = getattr(row, column)
        if value is not None and value < least:
            raise ValueError(f"{column} {value} at {row.tokens} tokens; use {least} or more")


def plan_steps(
    table: Sequence[ScheduleRow], *, micro_batch_tokens: int, world_size: int = 1
) -> list[PlannedStep]:
    """Plan every step of a run.

    Args:
        table: Rows that `check_table` accepts.
        micro_batch_tokens: Largest size of a micro-batch on a device, in tokens. A step is cut
            into equal micro-batches up to this size, of at least one window each.
        world_size: Number of devices.
    """
    check_table(table)
    steps: list[PlannedStep] = []
    start, end = 0, table[-1].tokens
    while start < end:
        length = _last_row_with("sequence_length", table, start).sequence_length or 0
        step_tokens = _last_row_with("step_tokens", table, start).step_tokens or 0
        windows = max(1, round(step_tokens / (length * world_size)))
        batch_size = _largest_divisor(windows, max(1, micro_batch_tokens // length))
        stop = start + windows * length * world_size
        middle = (start + stop) / 2
        lr = _interpolate("lr", table, middle)
        step = PlannedStep(
            first_token=start,
            sequence_length=length,
            batch_size=batch_size,
            micro_batches=windows // batch_size,
            lr=1.0 if lr is None else lr,
            momentum=_interpolate("momentum", table, middle),
            validate=stop >= end or _crosses_validation(table, start, stop),
        )
        steps.append(step)
        start = stop
    return steps


def step_shapes(steps: Sequence[PlannedStep]) -> list[tuple[int, int]]:
    """The distinct shapes of micro-batches (windows, predicted tokens), in order."""
    return list(dict.fromkeys((step.batch_size, step.sequence_length) for step in steps))


def _largest_divisor(number: int, limit: int) -> int:
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)


def _last_row_with(column: str, table: Sequence[ScheduleRow], tokens: int) -> ScheduleRow:
    """The last row up to `tokens` that sets `column`; the first row if there is none."""
    rows = [row for row in table if row.tokens <= tokens and getattr(row, column) is not None]
    return rows[-1] if rows else table[0]


def _interpolate(column: str, table: Sequence[ScheduleRow], tokens: float) -> float | None:
    """Interpolate linearly between the rows that set `column`; constant before and after them."""
    rows = [row for row in table if getattr(row, column) is not None]
    values = [getattr(row, column) for row in rows]
    return float(np.interp(tokens, [row.tokens for row in rows], values)) if rows else None


def _crosses_validation(table: Sequence[ScheduleRow], start: int, stop: int) -> bool:
    """Whether a step from `start` to `stop` reaches a multiple of the validation interval."""
    row = _last_row_with("validate_every", table, start)
    if not row.validate_every:
        return False
    return (stop - row.tokens) // row.validate_every > (start - row.tokens) // row.validate_every


class PowerLaw(LRScheduler):
    """The learning rates of hlb-gpt 0.4.1, which do not depend on the length of the run.

    The learning rate warms up linearly and then follows a power law of the steps since. The LM
    head follows another power law from the first step on, and the slopes decay exponentially.

    Args:
        optimizer: Optimizer with groups as `hlbgpt.optim.parameter_groups` names them.
        warmup_steps: Number of warm-up steps.
        warmup_start: Factor in the first step.
        power: Exponent of the steps since the warm-up.
        head_power: Exponent of the steps, for the LM head.
        slope_decay: Factor per step, for the slopes.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 100,
        warmup_start: float = 0.02,
        power: float = -0.08,
        head_power: float = -0.2,
        slope_decay: float = 0.995,
    ) -> None:
        if warmup_steps < 1:
            raise ValueError(f"warmup_steps: {warmup_steps} is less than 1; set it to at least 1")
        self.warmup_steps, self.warmup_start = warmup_steps, warmup_start
        self.power, self.head_power, self.slope_decay = power, head_power, slope_decay
        super().__init__(optimizer)

    def factor(self, group: str, step: int) -> float:
        """The factor of a group's learning rate in a step, counted from 0."""
        if group == "lm_head":
            return (step + 1) ** self.head_power
        if group == "slopes":
            return self.slope_decay**step
        if step < self.warmup_steps:
            return self.warmup_start + step / self.warmup_steps * (1 - self.warmup_start)
        return (step + 1 - self.warmup_steps) ** self.power

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each group in the current step."""
        return [
            base * self.factor(str(group.get("name")), self.last_epoch)
            for base, group in zip(self.base_lrs, self.optimizer.param_groups, strict=True)
        ]


def hlb041_micro_batches(
    estimate: float, *, grad_norm: float, parameters: int, step: int, rate: float
) -> float:
    """Update hlb-gpt 0.4.1's number of micro-batches, a real number, from the gradient norm.

    The number grows while the norm is above the expected one, a power law of the steps that was
    fitted to networks of different sizes, and shrinks while it is below. Unlike in hlb-gpt, it
    grows to at most four times itself at once, or one huge gradient would make a step endless.

    Args:
        estimate: The number before.
        grad_norm: Norm of the step's gradients of all parameters.
        parameters: Number of the network's parameters.
        step: Number of the step, counted from 0.
        rate: How fast the number changes.
    """
    size = math.log(parameters)
    expected = (parameters * size * (step + 0.01)) ** (-0.677 * size**-0.2)
    growth = 1 + rate * (grad_norm / parameters**0.5 / expected - 1)
    return max(0.1, estimate * min(4.0, growth))
