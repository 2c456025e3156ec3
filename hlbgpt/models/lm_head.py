"""The LM head: from features to logits, losses and scores.

Shapes: B sequences, T tokens, N = B x T, D width, V classes.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -1  # target of a position without a loss
EVAL_CHUNK_TOKENS = 2048  # evaluation computes logits in chunks even where training does not


class TokenScores(NamedTuple):
    """Result of evaluating each token; both (B, T), and 0 or False where the target is -1."""

    loss: Tensor  # cross-entropy in nats, float32
    correct: Tensor  # whether the target has the highest logit


def score(logits: Tensor, targets: Tensor, *, per_token: bool = False) -> Tensor | TokenScores:
    """Mean cross-entropy in nats, float32, or `TokenScores`, of logits (..., V).

    Positions of `targets` (...) with -1 have no loss.
    """
    flat, labels = logits.flatten(0, -2).float(), targets.flatten()
    losses = F.cross_entropy(flat, labels, ignore_index=IGNORE_INDEX, reduction="none")
    if not per_token:
        return mean_loss(losses, labels)
    return TokenScores(losses.view_as(targets), logits.argmax(-1) == targets)


def mean_loss(losses: Tensor, targets: Tensor) -> Tensor:
    """Mean of `losses` over the positions that have a target; losses elsewhere must be 0."""
    return losses.sum() / (targets >= 0).sum()


class LMHead(NamedTuple):
    """A linear classifier with V classes.

    Attributes:
        weight: (V, D).
        bias: (V,), constant, added to the logits after the softcap; or None.
        softcap: Limits logits to ± this with tanh; 0 for no limit.
        chunk_tokens: Number of tokens whose logits exist in float32 at a time; 0 for all. This
            saves memory, and time on a CPU, where the logits of a chunk fit into the caches.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float = 0.0
    chunk_tokens: int = 0

    def logits(self, x: Tensor) -> Tensor:
        """Logits (..., V) of features (..., D), in float32 with a softcap or a bias."""
        logits = F.linear(x, self.weight)
        if not self.softcap:
            return logits if self.bias is None else logits.float() + self.bias
        # In place, because new memory for so many numbers is slow on a CPU.
        capped = logits.float().div_(self.softcap).tanh_()
        if self.bias is None:
            return self.softcap * capped
        return torch.add(self.bias, capped, alpha=self.softcap)  # one pass over the logits

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy (N,) in nats, float32, of features (N, D); 0 where the target is -1."""
        if self.chunk_tokens:
            return _ChunkedLosses.apply(
                x, self.weight, self.bias, targets, self.softcap, self.chunk_tokens
            )
        logits = self.logits(x).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")

    def output(
        self, x: Tensor, targets: Tensor | None, *, per_token: bool = False
    ) -> Tensor | TokenScores:
        """What `Network.forward` returns, of features (B, T, D)."""
        if targets is None:
            return self.logits(x)
        flat, labels = x.flatten(0, 1), targets.flatten()
        if not per_token:
            return mean_loss(self.losses(flat, labels), labels)
        size = self.chunk_tokens or EVAL_CHUNK_TOKENS
        scores = [
            score(self.logits(part).float(), wanted, per_token=True)  # argmax is slow in bf16
            for part, wanted in zip(flat.split(size), labels.split(size), strict=True)
        ]
        loss, correct = (torch.cat(parts).view_as(targets) for parts in zip(*scores, strict=True))
        return TokenScores(loss, correct)


class _ChunkedLosses(torch.autograd.Function):
    """`LMHead.losses` whose float32 logits exist for one chunk of tokens at a time.

    The forward pass also computes the gradient with respect to the raw logits and keeps it in the
    precision of the products, 2 bytes per logit under autocast. Recomputing the logits in the
    backward pass (`torch.utils.checkpoint`) would save this memory, but takes 1.5 to 2.9 times as
    long on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float,
        chunk_tokens: int,
    ) -> Tensor:
        ctx.dtypes, device = (x.dtype, weight.dtype), x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, weight = x.to(dtype), weight.to(dtype)
        losses = x.new_empty(len(x), dtype=torch.float32)
        grads = x.new_empty(len(x), len(weight))
        with torch.autocast(device, enabled=False):
            for start in range(0, len(x), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                logits = (x[rows] @ weight.T).float()
                losses[rows], grads[rows] = _losses_and_grad_(logits, bias, targets[rows], softcap)
        ctx.save_for_backward(x, weight, grads)
        return losses

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, grads = ctx.saved_tensors
        scale = scale[:, None]
        with torch.autocast(x.device.type, enabled=False):
            grad_x, grad_weight = (grads @ weight) * scale, grads.T @ (x * scale).to(x.dtype)
        return grad_x.to(ctx.dtypes[0]), grad_weight.to(ctx.dtypes[1]), None, None, None, None


def _losses_and_grad_(
    z: Tensor, bias: Tensor | None, targets: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    """Losses (N,) and their gradient (N, V), which overwrites the raw logits `z` to save time."""
    if softcap:
        slope = 1 - z.div_(softcap).tanh_().square()
        z *= softcap
    if bias is not None:
        z += bias
    valid, index = targets[:, None] >= 0, targets.clamp(min=0)[:, None]
    target_logit, top = z.gather(1, index), z.amax(-1, keepdim=True)
    total = z.sub_(top).exp_().sum(-1, keepdim=True)
    losses = (top + total.log() - target_logit).where(valid, 0.0)
    z *= valid / total  # softmax; 0 where there is no target
    z.scatter_add_(1, index, -valid.to(z.dtype))
    return losses[:, 0], z.mul_(slope) if softcap else z
