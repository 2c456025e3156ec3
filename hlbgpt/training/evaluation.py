"""Evaluation: when a validation follows a step, and what it measures on a whole split."""

import math
import sys

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from hlbgpt.data.token_file import Header
from hlbgpt.models import Network, token_scores

_NEVER = sys.maxsize  # divides no number of batches


def schedule_validation(trainer: L.Trainer, due: bool) -> bool:
    """Let a validation follow the current batch, or not; returns whether one follows."""
    due = due and trainer.enable_validation
    # Not documented, but public: Lightning validates after batches that are multiples of it.
    trainer.val_check_batch = 1 if due else _NEVER
    return due


def is_multiple_of_interval(trainer: L.Trainer, step: int) -> bool:
    """Whether `trainer.val_check_interval` asks for a validation after `step`, counted from 1."""
    interval = trainer.val_check_interval
    return isinstance(interval, int) and step % interval == 0


class Evaluation(nn.Module):
    """Adds up losses over batches and ranks, in double precision where the device has it.

    So the result does not depend on how the split is cut into batches.

    Attributes:
        dtype: Precision of the sums.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss, self.accuracy = MeanMetric(), MeanMetric()
        self.dtype = torch.float64

    def update(self, net: Network, batch: Tensor) -> None:
        """Measure `net` on a batch (B, T + 1) int64, in which -1 fills up short windows."""
        # Here, because a precision such as bf16-true converts the sums with the weights.
        self.loss.set_dtype(self.dtype)
        self.accuracy.set_dtype(self.dtype)
        scores, counted = token_scores(net, batch), batch[:, 1:] >= 0
        self.loss.update(scores.loss, counted)
        self.accuracy.update(scores.correct, counted)

    def compute(self, header: Header) -> dict[str, Tensor]:
        """Loss in nats per token, perplexity, bits per byte and accuracy; then resets the sums.

        Args:
            header: Of the split's token file, all of whose tokens but the first were predicted.
        """
        loss, accuracy = self.loss.compute(), self.accuracy.compute()
        self.loss.reset()
        self.accuracy.reset()
        return {
            "loss": loss,
            "perplexity": loss.exp(),
            "bits_per_byte": loss * (header.tokens - 1) / math.log(2) / header.text_bytes,
            "accuracy": accuracy,
        }
