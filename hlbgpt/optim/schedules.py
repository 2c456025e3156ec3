"""Schedules as pure functions: the steps that a table describes, and hlb-gpt 0.4.1's power laws."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import inf, isqrt, prod
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hlbgpt.utils.errors import MOST_BATCH_TOKENS

_MOST_TOKENS = 10**18  # steps are counted in 63 bits
# Lowest and highest value of each column.
_LIMITS: dict[str, tuple[float, float]] = {
    "tokens": (0, _MOST_TOKENS),
    "sequence_length": (1, MOST_BATCH_TOKENS),
    "step_tokens": (1, MOST_BATCH_TOKENS),
    "lr": (0, inf),
    "momentum": (0, inf),
    "vocab_loss": (0, inf),
    "validate_every": (0, _MOST_TOKENS),
}


@dataclass(frozen=True)
class ScheduleRow:
    """A row of the schedule: the settings from a number of tokens on.

    `sequence_length`, `step_tokens` and `validate_every` hold until a later row sets them again.
    `lr`, `momentum` and `vocab_loss` are interpolated linearly between the rows that set them. The
    last row marks the end of the run; its sequence length and step size are not used.

    Args:
        tokens: Tokens seen when this row begins.
        sequence_length: Predicted tokens of a training window.
        step_tokens: Tokens of an optimizer step on all devices, rounded to whole windows.
        lr: Factor of every group's learning rate.
        momentum: Muon's momentum.
        vocab_loss: `Network.vocab_loss_weight`.
        validate_every: Tokens between validations; 0 for none. A validation always follows the
            last step.
    """

    tokens: int
    sequence_length: int | None = None
    step_tokens: int | None = None
    lr: float | None = None
    momentum: float | None = None
    vocab_loss: float | None = None
    validate_every: int | None = None


class PlannedStep(NamedTuple):
    """An optimizer step of a schedule."""

    first_token: int  # tokens seen before the step, on all devices
    sequence_length: int  # predicted tokens of a window
    batch_size: int  # windows in a micro-batch, on each device
    micro_batches: int
    lr: float  # factor of every group's learning rate
    momentum: float | None  # Muon's; None to leave it unchanged
    vocab_loss: float | None  # weight of the second loss; None to leave it unchanged
    validate: bool  # whether a validation follows

    def tokens(self, world_size: int = 1) -> int:
        """Predicted tokens of the step on all devices."""
        return self.sequence_length * self.batch_size * self.micro_batches * world_size


class Stage(NamedTuple):
    """Successive steps of one shape."""

    first_step: int  # counted from 0
    first_token: int  # tokens seen before the first step, on all devices
    steps: int
    sequence_length: int
    batch_size: int
    micro_batches: int


class _Column:
    """The values of a column, and from which token on each of them holds."""

    def __init__(self, table: Sequence[ScheduleRow], name: str) -> None:
        rows = [row for row in table if getattr(row, name) is not None]
        self.starts = [row.tokens for row in rows]
        self.values = [getattr(row, name) for row in rows]

    def at(self, tokens: int) -> tuple[int, Any]:
        """Where the value begins that holds at `tokens`, and the value; None before the first."""
        number = bisect_right(self.starts, tokens) - 1
        return (self.starts[number], self.values[number]) if number >= 0 else (0, None)

    def interpolated(self, tokens: float) -> float | None:
        """Interpolated linearly between the rows; constant before and after them."""
        after = bisect_right(self.starts, tokens)
        if after == 0 or after == len(self.starts):
            return float(self.values[max(0, after - 1)]) if self.starts else None
        (x, next_x), (y, next_y) = (
            row[after - 1 : after + 1] for row in (self.starts, self.values)
        )
        return float((next_y - y) / (next_x - x) * (tokens - x) + y)


class StepPlan:
    """Every step of a run, computed when it is asked for; used like a list of `PlannedStep`.

    Made by `plan_steps`. Without arguments it is a plan of no steps.

    Attributes:
        stages: Stages of the run, at most one for each row that sets the shape of steps.
    """

    def __init__(
        self,
        table: Sequence[ScheduleRow] = (),
        stages: Sequence[Stage] = (),
        world_size: int = 1,
    ) -> None:
        self.stages = list(stages)
        self._world_size = world_size
        self._end = table[-1].tokens if table else 0
        self._lr, self._momentum = _Column(table, "lr"), _Column(table, "momentum")
        self._vocab_loss = _Column(table, "vocab_loss")
        self._validate_every = _Column(table, "validate_every")
        self._first_steps = [stage.first_step for stage in self.stages]

    def __len__(self) -> int:
        return self.stages[-1].first_step + self.stages[-1].steps if self.stages else 0

    def __iter__(self) -> Iterator[PlannedStep]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> PlannedStep:
        number = range(len(self))[number]  # counts from the end if negative; IndexError beyond
        stage = self.stages[bisect_right(self._first_steps, number) - 1]
        shape = stage.sequence_length, stage.batch_size, stage.micro_batches
        step_tokens = prod(shape) * self._world_size
        start = stage.first_token + (number - stage.first_step) * step_tokens
        stop = start + step_tokens
        middle = (start + stop) / 2
        lr = self._lr.interpolated(middle)
        momentum, vocab_loss = (
            column.interpolated(middle) for column in (self._momentum, self._vocab_loss)
        )
        validate = stop >= self._end or self._crosses_validation(start, stop)
        lr = 1.0 if lr is None else lr
        return PlannedStep(start, *shape, lr, momentum, vocab_loss, validate)

    def _crosses_validation(self, start: int, stop: int) -> bool:
        """Whether a step from `start` to `stop` reaches a multiple of the validation interval."""
        begin, every = self._validate_every.at(start)
        return bool(every) and (stop - begin) // every > (start - begin) // every


def check_table(table: Sequence[ScheduleRow]) -> None:
    """Raise ValueError for a table from which no run can be planned."""
    if len(table) < 2:
        raise ValueError(f"{len(table)} rows; give at least a first row and the end of the run")
    if table[0].tokens != 0:
        raise ValueError(f"the first row begins at {table[0].tokens} tokens; set it to 0")
    if not (table[0].sequence_length and table[0].step_tokens):
        raise ValueError("the first row lacks sequence_length or step_tokens; set both")
    for above, below in pairwise(table):
        if below.tokens <= above.tokens:
            raise ValueError(
                f"a row at {below.tokens} tokens follows one at {above.tokens}; sort the rows"
            )
    for row, (column, (least, most)) in product(table, _LIMITS.items()):
        value = getattr(row, column)
        if value is not None and not least <= value <= most:
            limit = f"{most} or less" if value > most else f"{least} or more"
            raise ValueError(f"{column} {value} at {row.tokens} tokens; use {limit}")


def plan_steps(
    table: Sequence[ScheduleRow], *, micro_batch_tokens: int, world_size: int = 1
) -> StepPlan:
    """Plan every step of a run.

    Args:
        table: Rows that `check_table` accepts.
        micro_batch_tokens: Largest size of a micro-batch on a device, in tokens. A step is cut
            into equal micro-batches up to this size, of at least one window each.
        world_size: Number of devices.
    """
    check_table(table)
    lengths, sizes = _Column(table, "sequence_length"), _Column(table, "step_tokens")
    step, start, end = 0, 0, table[-1].tokens
    changes = sorted({*lengths.starts, *sizes.starts, end})
    stages = []
    while start < end:
        (_, length), (_, step_tokens) = lengths.at(start), sizes.at(start)
        windows = max(1, round(step_tokens / (length * world_size)))
        batch_size = _largest_divisor(windows, max(1, micro_batch_tokens // length))
        next_change = changes[bisect_right(changes, start)]
        steps = -(-(next_change - start) // (windows * length * world_size))
        stages.append(Stage(step, start, steps, length, batch_size, windows // batch_size))
        step, start = step + steps, start + steps * windows * length * world_size
    return StepPlan(table, stages, world_size)


def step_shapes(plan: StepPlan) -> list[tuple[int, int]]:
    """The distinct shapes of micro-batches (windows, predicted tokens), in order."""
    return list(dict.fromkeys((s.batch_size, s.sequence_length) for s in plan.stages))


def _largest_divisor(number: int, limit: int) -> int:
    small = [divisor for divisor in range(1, isqrt(number) + 1) if number % divisor == 0]
    return max(size for size in (*small, *(number // each for each in small)) if size <= limit)


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
