"""Which micro-batches make up an optimizer step, and after which steps a validation falls."""

import sys
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

_NEVER = sys.maxsize  # divides no number of batches


class StepPlan:
    """Steps of any number of micro-batches, under Lightning's own loop.

    Lightning ends a step where the batch's number is a multiple of `accumulate_grad_batches`,
    which cannot express a number that changes, nor a last step of a pass that is shorter than the
    others. So that attribute is set to the number at which the step is to end. Likewise it
    validates at multiples of `val_check_batch`, in the middle of a step too, when tokens have been
    seen that no weight has learned from; here a validation waits for the end of its step. The
    last step of a run is always validated.

    Attributes:
        micro_batches: Of the steps to come; callbacks may set it between steps.
        size: Micro-batches of the current step.
        end: Number of the batch within the pass at which the current step ends.
        sequence_length: Predicted tokens in the windows of the last micro-batch.
        micro_batch_tokens: Predicted tokens of the last micro-batch, on all devices.
        losses: Of the current step's micro-batches so far, on the device.
        validates: Whether a validation follows the step of a number, the first being 0; None to
            go by the trainer's `val_check_interval`.
        validation_due: Whether a validation follows the current batch and has not been made.
        skipped: Whether the current step is left out: it has no gradients.
    """

    def __init__(self) -> None:
        self.micro_batches = 1
        self.size = self.end = self.sequence_length = self.micro_batch_tokens = 0
        self.losses: list[Tensor] = []
        self.validation_due = self.skipped = False
        self.validates: Callable[[int], bool] | None = None
        self._interval: float | None = None

    def begin_run(self, trainer: L.Trainer) -> None:
        self._interval = trainer.val_check_batch if self.validates is None else 1
        trainer.accumulate_grad_batches = self.micro_batches

    def begin_batch(self, trainer: L.Trainer, batch_idx: int) -> None:
        """Settle before batch `batch_idx` of a pass whether it begins or ends a step."""
        if self.begins_step(batch_idx):
            left = int(trainer.num_training_batches) - batch_idx
            self.size = max(1, min(self.micro_batches, left))
            self.end = batch_idx + self.size
            self.losses, self.skipped = [], False
            trainer.accumulate_grad_batches = self.end
        self.validation_due = batch_idx + 1 == self.end and self._validates(trainer, batch_idx)
        if isinstance(self._interval, int):
            trainer.val_check_batch = 1 if self.validation_due else _NEVER

    def begins_step(self, batch_idx: int) -> bool:
        return batch_idx == 0 or batch_idx >= self.end

    def _validates(self, trainer: L.Trainer, batch_idx: int) -> bool:
        """Whether the step that ends with this batch is the last, or contains an interval's end."""
        if not isinstance(self._interval, int):  # by time, or by the pass: Lightning decides
            return False
        if not trainer.fit_loop.epoch_loop._should_check_val_epoch():
            return False
        if is_last_step(trainer):
            return True
        if self.validates is not None:
            return self.validates(trainer.global_step)
        every_pass = trainer.check_val_every_n_epoch is not None
        done = (batch_idx if every_pass else trainer.fit_loop.total_batch_idx) + 1
        return done // self._interval > (done - self.size) // self._interval

    @property
    def mean_loss(self) -> Tensor:
        """Mean loss of the step's micro-batches so far, in nats; a scalar on the device."""
        return torch.stack(self.losses).mean()

    def state_dict(self) -> dict[str, Any]:
        return {
            "micro_batches": self.micro_batches,
            "size": self.size,
            "end": self.end,
            "losses": self.losses,
            "validation_due": self.validation_due,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.size, self.end = state["size"], state["end"]
        self.losses = [loss.to(device) for loss in state["losses"]]
        self.validation_due = state["validation_due"]


def is_last_step(trainer: L.Trainer) -> bool:
    """Whether the step under way reaches `max_steps`."""
    return 0 < trainer.max_steps <= trainer.global_step + 1
