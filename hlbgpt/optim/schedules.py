"""What changes while a run goes on, as pure functions: the table of a schedule, and power laws."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True)
class Row:
    """A row of the schedule: what holds from a number of tokens on.

    A shape (sequence length, tokens a step) or validation interval holds until a later row names
    another. The learning-rate factor and the momentum run in straight lines from one row that
    names them to the next. The last row is the end of the run; its shape is not used.

    Args:
        tokens: Tokens seen at which this row begins.
        sequence_length: Predicted tokens in a training window.
        step_tokens: Tokens of an optimizer step, on all devices; rounded to whole windows.
        lr: Factor of every group's learning rate.
        momentum: Of Muon.
        validate_every: Tokens between two validations; 0 for none. The last step always has one.
    """

    tokens: int
    sequence_length: int | None = None
    step_tokens: int | None = None
    lr: float | None = None
    momentum: float | None = None
    validate_every: int | None = None


class Step(NamedTuple):
    """An optimizer step as planned.

    Attributes:
        first_token: Tokens seen before it, on all devices.
        sequence_length: Predicted tokens in a window.
        batch_size: Windows in a micro-batch, on each device.
        micro_batches: Micro-batches of the step.
        lr: Factor of every group's learning rate.
        momentum: Of Muon; None to leave it as it is.
        validate: Whether a validation follows.
    """

    first_token: int
    sequence_length: int
    batch_size: int
    micro_batches: int
    lr: float
    momentum: float | None
    validate: bool

    def tokens(self, world_size: int = 1) -> int:
        """Tokens that it trains on, on all devices."""
        return self.sequence_length * self.batch_size * self.micro_batches * world_size


def require_sane(table: Sequence[Row]) -> None:
    """Raise ValueError for a table from which no run can be planned."""
    if len(table) < 2:
        raise ValueError(f"{len(table)} rows; give at least a first one and the end")
    if table[0].tokens != 0:
        raise ValueError(f"the first row begins at {table[0].tokens} tokens; let it be 0")
    if not (table[0].sequence_length and table[0].step_tokens):
        raise ValueError("the first row lacks sequence_length or step_tokens; name both")
    for above, below in itertools.pairwise(table):
        if below.tokens <= above.tokens:
            raise ValueError(
                f"a row at {below.tokens} tokens follows one at {above.tokens}; let them rise"
            )
    for row in table:
        for key in ("sequence_length", "step_tokens"):
            if (value := getattr(row, key)) is not None and value < 1:
                raise ValueError(f"{key} {value} at {row.tokens} tokens; use 1 or more")
        for key in ("lr", "momentum", "validate_every"):
            if (value := getattr(row, key)) is not None and value < 0:
                raise ValueError(f"{key} {value} at {row.tokens} tokens is negative")


def plan_steps(table: Sequence[Row], *, micro_batch_tokens: int, world_size: int = 1) -> list[Step]:
    """Every step of a run, from its table.

    Args:
        table: Rows, as `require_sane` takes them.
        micro_batch_tokens: Most tokens of a micro-batch on a device. A step is cut into equal
            micro-batches no larger, but of one window at least.
        world_size: Number of devices.
    """
    require_sane(table)
    steps: list[Step] = []
    seen = 0
    while seen < table[-1].tokens:
        length, step_tokens = (
            int(_holding(table, seen, key) or 0) for key in ("sequence_length", "step_tokens")
        )
        windows = max(1, round(step_tokens / (length * world_size)))
        batch_size, micro_batches = _cut(windows, max(1, micro_batch_tokens // length))
        after = seen + windows * length * world_size
        middle = (seen + after) / 2
        lr, momentum = _between(table, middle, "lr"), _between(table, middle, "momentum")
        steps.append(
            Step(
                first_token=seen,
                sequence_length=length,
                batch_size=batch_size,
                micro_batches=micro_batches,
                lr=1.0 if lr is None else lr,
                momentum=momentum,
                validate=_validates(table, seen, after),
            )
        )
        seen = after
    return steps


def _cut(windows: int, most: int) -> tuple[int, int]:
    """Windows in a micro-batch, `most` at most, and how many micro-batches make up `windows`."""
    size = next(size for size in range(min(windows, most), 0, -1) if windows % size == 0)
    return size, windows // size


def _holding(table: Sequence[Row], tokens: float, key: str) -> float | None:
    """The value of the last row up to `tokens` that names it."""
    values = [getattr(row, key) for row in table if row.tokens <= tokens]
    return next((value for value in reversed(values) if value is not None), None)


def _between(table: Sequence[Row], tokens: float, key: str) -> float | None:
    """The value on the straight line between the rows around `tokens` that name it."""
    points = [(row.tokens, getattr(row, key)) for row in table if getattr(row, key) is not None]
    if not points:
        return None
    before = max((point for point in points if point[0] <= tokens), default=points[0])
    after = min((point for point in points if point[0] > tokens), default=before)
    if after[0] <= before[0]:
        return before[1]
    share = (tokens - before[0]) / (after[0] - before[0])
    return before[1] + share * (after[1] - before[1])


def _validates(table: Sequence[Row], before: int, after: int) -> bool:
    """Whether a step from `before` to `after` passes a multiple of the interval, or is the last."""
    if after >= table[-1].tokens:
        return True
    row = max(
        (row for row in table if row.tokens <= before and row.validate_every is not None),
        key=lambda row: row.tokens,
        default=None,
    )
    if row is None or not row.validate_every:
        return False
    before, after = before - row.tokens, after - row.tokens
    return after // row.validate_every > before // row.validate_every


def shapes(steps: Sequence[Step]) -> Iterator[tuple[int, int]]:
    """Each (windows, predicted tokens) of a micro-batch that comes up, once, in order."""
    yield from dict.fromkeys((step.batch_size, step.sequence_length) for step in steps)


class PowerLaw(LRScheduler):
    """The learning rates of hlb-gpt 0.4.1, which know no end of the run.

    Warm-up in a straight line, then a power of the steps since; the head falls by another power
    from the first step, and slopes of positions by a factor a step.

    Args:
        optimizer: With groups as `hlbgpt.optim.muon` names them.
        warmup_steps: Steps until the full learning rate.
        warmup_start: Factor of the first step.
        power: Of the steps since warm-up.
        head_power: Of the steps made, for the head.
        slope_decay: Factor a step, for the slopes.
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
            raise ValueError(f"warmup_steps {warmup_steps} is less than 1")
        self.warmup_steps, self.warmup_start = warmup_steps, warmup_start
        self.power, self.head_power, self.slope_decay = power, head_power, slope_decay
        super().__init__(optimizer)

    def factor(self, group: str, step: int) -> float:
        """Factor of the group's learning rate in step number `step`, the first being 0."""
        if group == "head":
            return (step + 1) ** self.head_power
        if group == "slopes":
            return self.slope_decay**step
        if step < self.warmup_steps:
            return self.warmup_start + step / self.warmup_steps * (1 - self.warmup_start)
        return (step + 1 - self.warmup_steps) ** self.power

    def get_lr(self) -> list[float | Tensor]:
        return [
            base * self.factor(str(group.get("name")), self.last_epoch)
            for base, group in zip(self.base_lrs, self.optimizer.param_groups, strict=True)
        ]


def steered_batch(
    estimate: float, *, grad_norm: float, parameters: int, step: int, rate: float
) -> float:
    """hlb-gpt 0.4.1's number of micro-batches, a fraction, after a look at the gradient.

    It rises while the norm is above a power law of the steps that networks of so many parameters
    were seen to follow, and falls while it is below.

    Args:
        estimate: The number before.
        grad_norm: Of the step's gradients, all taken as one vector.
        parameters: Of the network.
        step: Number of the step, the first being 0.
        rate: How fast the number follows.
    """
    size = math.log(parameters)
    expected = (parameters * size * (step + 0.01)) ** (-0.677 * size**-0.2)
    return max(0.1, estimate * (1 + rate * (grad_norm / parameters**0.5 / expected - 1)))
