"""What the ranks of a run decide together after a step, such as to stop."""

import time

import torch
import torch.distributed as dist

from hlbgpt.optim.ranks import has_other_ranks

_SECONDS = 1.0  # between two votes, about


class Vote:
    """Finds the largest value that a rank has, about once a second and after the same step on all.

    The ranks exchange numbers through the hosts' network, with gloo: so no host waits for its
    device, nor a device for the vote. On one device every step is voted on, at no cost.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._step, self._time = 0, 0.0  # of the last vote
        self._interval = 1  # steps from there to the next vote

    def begin(self, step: int) -> None:
        """Training begins or goes on after `step`; every rank must ask."""
        self._group = None
        if has_other_ranks():
            self._group = dist.new_group(backend="gloo")
        self._step, self._time, self._interval = step, time.monotonic(), 1

    def is_due(self, step: int) -> bool:
        """Whether the ranks vote after `step`; the same on all of them."""
        return self._group is None or step >= self._step + self._interval

    def largest(self, step: int, *values: int) -> list[int]:
        """The largest of each of the `values` on all ranks; every rank must ask after `step`."""
        if self._group is None:
            return list(values)
        now = time.monotonic()
        pace = (step - self._step) / max(now - self._time, 1e-9)  # steps in a second
        # At most doubled: at the start of training a host runs ahead of its device.
        interval = max(1, min(2 * self._interval, int(_SECONDS * pace)))
        numbers = torch.tensor([-interval, *values])
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group)
        interval, *largest = numbers.tolist()
        self._step, self._time, self._interval = step, now, -interval
        return largest
