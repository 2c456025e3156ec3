"""Evaluation: when a validation follows a step, and what it measures on a whole split."""

import math
import sys
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric

from hlbgpt.data import TokenDataModule
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


class Evaluation(Metric):
    """Adds up losses over batches and ranks, in double precision where the device has it.

    So the result does not depend on how the split is cut into batches.

    Attributes:
        sum_dtype: Precision of the sum of losses.
    """

    full_state_update = False
    loss_sum: Tensor  # nats
    correct: Tensor  # tokens that had the highest logit
    tokens: Tensor  # that were predicted
    windows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.sum_dtype = torch.float64
        self.add_state("loss_sum", torch.zeros(()), "sum")
        for count in ("correct", "tokens", "windows"):
            self.add_state(count, torch.zeros((), dtype=torch.int64), "sum")

    def update(self, net: Network, batch: Tensor) -> None:
        """Measure `net` on a batch (B, T + 1) int64, in which -1 fills up short windows."""
        scores, counted = token_scores(net, batch), batch[:, 1:] >= 0
        # Cast here, because a precision such as bf16-true converts the sum with the weights.
        self.loss_sum = self.loss_sum.to(self.sum_dtype) + scores.loss.to(self.sum_dtype).sum()
        self.correct += scores.correct.sum()
        self.tokens += counted.sum()
        self.windows += counted.any(1).sum()

    def compute(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sum of losses, correct tokens, tokens and windows, over all ranks."""
        return self.loss_sum, self.correct, self.tokens, self.windows

    def finish(
        self, header: Header, sequence_length: int
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Loss in nats per token, perplexity, bits per byte and accuracy; then resets the sums.

        Args:
            header: Of the split's token file.
            sequence_length: Predicted tokens of a window.

        Returns:
            The metrics, and the `coverage` of the split.
        """
        loss_sum, correct, tokens, windows = self.compute()
        self.reset()
        loss = loss_sum / tokens
        metrics = {
            "loss": loss,
            "perplexity": loss.exp(),
            "bits_per_byte": loss * (header.tokens - 1) / math.log(2) / header.text_bytes,
            "accuracy": correct / tokens,
        }
        return metrics, coverage(header, sequence_length, int(tokens), int(windows))


def coverage(header: Header, sequence_length: int, tokens: int, windows: int) -> dict[str, Any]:
    """What an evaluation measured, for records: a value means nothing without it.

    Args:
        header: Of the split's token file, all of whose tokens but the first can be predicted.
        sequence_length: Predicted tokens of a window.
        tokens: Tokens that were predicted.
        windows: Windows that were predicted.
    """
    return {
        "tokens": tokens,
        "split_tokens": header.tokens - 1,
        "windows": windows,
        "sequence_length": sequence_length,
        "fingerprint": header.fingerprint,
        "complete": tokens == header.tokens - 1,
    }


def still_holds(measured: dict[str, Any], trainer: L.Trainer, data: TokenDataModule) -> bool:
    """Whether a validation of this run would measure the same as an earlier one.

    Args:
        measured: The `coverage` of the earlier validation.
        trainer: The trainer, with its limit of validation batches.
        data: The datamodule, set up for training.
    """
    loader, limit = data.val_dataloader(), trainer.limit_val_batches
    now = data.files["validation"].header.fingerprint, data.eval_sequence_length
    if (measured["fingerprint"], measured["sequence_length"]) != now:
        return False
    batches = int(limit * len(loader)) if isinstance(limit, float) else limit
    windows = batches * data.eval_batch_size * trainer.world_size
    return measured["complete"] or measured["windows"] == windows


def part_of_split(measured: dict[str, Any]) -> str:
    """How much of its split an evaluation measured, as in `10% of the split`."""
    percent = 100 * measured["tokens"] / measured["split_tokens"]
    return f"{percent:.3g}% of the split"
