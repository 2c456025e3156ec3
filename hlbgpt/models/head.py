"""From logits to what training and evaluation need, so that logits stay inside a network."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

_IGNORE = -1


class TokenScores(NamedTuple):
    """What evaluation needs of each predicted token; both (B, T).

    Attributes:
        loss: Cross-entropy in nats, float32; 0 where the target is -1.
        correct: Whether the target had the highest logit; False where the target is -1.
    """

    loss: Tensor
    correct: Tensor


def score(logits: Tensor, targets: Tensor, *, per_token: bool = False) -> Tensor | TokenScores:
    """Cross-entropy of `logits` (B, T, V) against `targets` (B, T); a target of -1 has no loss.

    Returns the mean in nats over the targets, float32, or with `per_token` a `TokenScores`.
    """
    flat, labels = logits.flatten(0, -2).float(), targets.flatten()
    if not per_token:
        return F.cross_entropy(flat, labels, ignore_index=_IGNORE)
    loss = F.cross_entropy(flat, labels, ignore_index=_IGNORE, reduction="none")
    return TokenScores(loss.view_as(targets), logits.argmax(-1) == targets)
