"""A batch is one optimizer step: gradients of its micro-batches add up, then the weights change.

Shapes: M micro-batches, B windows of a micro-batch on each device, T predicted tokens of a window.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from hlbgpt.optim.ranks import has_other_ranks
from hlbgpt.training.checks import require_no_accumulation
from hlbgpt.training.evaluation import is_multiple_of_interval, schedule_validation


class MicroBatchedModule(L.LightningModule):
    """Trains on batches (M, B, T + 1), each of which is one optimizer step of M micro-batches.

    Optimization stays automatic: Lightning's closure, which runs `training_step` and the backward
    pass, is called once for each micro-batch within one call of the optimizer. So clipping,
    precision, schedulers and callbacks work as ever, and the batch index, `trainer.global_step`
    and the number of the step are one number. Where M is 1, `trainer.accumulate_grad_batches`
    works as Lightning means it.

    Attributes:
        step_shape: (M, B, T) of the current batch.
        net: The network, called with (tokens, targets); returns the mean loss. Set by subclasses.
        ends_step: Whether an optimizer step follows the current batch; always, unless Lightning
            accumulates gradients over batches.
        step_losses: Loss of each micro-batch of the step so far, on the device.
        validation_due: Whether a validation follows the current batch.
        validates_after: Whether a validation follows step n, counted from 1; None to follow
            `trainer.val_check_interval`. The last step is followed by one in any case.
    """

    net: torch.nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.ends_step = self.validation_due = False
        self.validates_after: Callable[[int], bool] | None = None
        self.step_shape = (1, 0, 0)
        self._micro_batch = 0  # number of the current one within the batch
        self.step_losses: list[Tensor] = []

    def is_last_step(self, step: int) -> bool:
        """Whether training ends with step number `step`, counted from 1."""
        return step == self.trainer.max_steps

    # --- the step -----------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.step_shape = batch.shape[0], batch.shape[1], batch.shape[2] - 1
        self._micro_batch = 0
        if len(batch) > 1:
            require_no_accumulation(self.trainer, f"{len(batch)} micro-batches in a batch")
        self.ends_step = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        due = self.ends_step and self._validates_after(self.trainer.global_step + 1)
        self.validation_due = schedule_validation(self.trainer, due)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean loss of the current micro-batch, divided by the number of micro-batches."""
        if self._micro_batch == 0 and batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.step_losses = []
        windows = batch[self._micro_batch]  # (B, T + 1)
        loss = self.net(windows[:, :-1], windows[:, 1:])
        self.step_losses.append(loss.detach())
        return loss / len(batch)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Run the closure for each micro-batch, then step once."""
        assert optimizer_closure is not None
        micro_batches = self.step_shape[0]

        def accumulate_gradients() -> Any:
            loss = 0.0
            for self._micro_batch in range(micro_batches):
                last = self._micro_batch + 1 == micro_batches
                with contextlib.nullcontext() if last else self._no_sync():
                    loss = loss + optimizer_closure()
            return loss

        optimizer.step(closure=accumulate_gradients)

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Leave the exchange of gradients between ranks to the last micro-batch."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ParallelStrategy):
            return strategy.block_backward_sync()
        return contextlib.nullcontext()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear gradients before the backward pass of the first micro-batch only."""
        if self._micro_batch == 0:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def _validates_after(self, step: int) -> bool:
        if self.is_last_step(step):
            return True
        if self.validates_after is not None:
            return self.validates_after(step)
        return is_multiple_of_interval(self.trainer, step)

    # --- what callbacks ask for ---------------------------------------------------------------

    @property
    def step_loss(self) -> Tensor:
        """Mean loss of the step's micro-batches on all ranks, in nats; a scalar on the device.

        The ranks exchange it, so all of them must ask.
        """
        return mean_over_ranks(torch.stack(self.step_losses).mean())


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of each number over the ranks, all of which must ask; stays on the device.

    Lightning's `strategy.reduce` also makes a barrier, for which the host would wait.
    """
    if not has_other_ranks():
        return values
    values = values / dist.get_world_size()
    dist.all_reduce(values)
    return values
