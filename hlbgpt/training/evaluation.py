"""Evaluation: mean loss and accuracy over every predicted token of a split."""

import math

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from hlbgpt.data.token_file import Header
from hlbgpt.models import Network, token_scores


class Evaluation(nn.Module):
    """Adds up losses over batches and ranks, in double precision where the device has it.

    So the result does not depend on how the split is cut into batches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss, self.accuracy = MeanMetric(), MeanMetric()
        self.set_dtype(torch.float64)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Set the precision of the sums; `Module.to` would not."""
        self.loss.set_dtype(dtype)
        self.accuracy.set_dtype(dtype)

    def update(self, net: Network, batch: Tensor) -> None:
        """Measure `net` on a batch (B, T + 1) int64, in which -1 fills up short windows."""
        scores, counted = token_scores(net, batch), batch[:, 1:] >= 0
        self.loss.update(scores.loss, counted)
        self.accuracy.update(scores.correct, counted)

    def compute(self, header: Header) -> dict[str, Tensor]:
        """Loss in nats per token, perplexity, bits per byte and accuracy; starts anew.

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
