"""From features to what training and evaluation need, so that logits stay inside a network.

Shapes: B sequences, T tokens, N = B x T, D width, V classes.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -1  # target without a loss


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
        return F.cross_entropy(flat, labels, ignore_index=IGNORE)
    loss = F.cross_entropy(flat, labels, ignore_index=IGNORE, reduction="none")
    return TokenScores(loss.view_as(targets), logits.argmax(-1) == targets)


class Classes(NamedTuple):
    """A linear classifier over V classes.

    Attributes:
        weight: (V, D).
        bias: (V,) added to the logits, or None.
        softcap: Logits are kept within ± this by tanh, before the bias; 0 for no cap.
        chunk: Tokens whose logits exist at a time, in training too; 0 for all. Saves memory, and
            time on a CPU, whose caches then hold the logits.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float = 0.0
    chunk: int = 0

    def logits(self, x: Tensor) -> Tensor:
        """(..., V) of `x` (..., D), float32 if there is a cap or a bias."""
        logits = F.linear(x, self.weight)
        if self.softcap:
            logits = self.softcap * torch.tanh(logits.float() / self.softcap)
        return logits if self.bias is None else logits.float() + self.bias

    def sum_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of `x` (N, D) against `targets` (N,), summed; float32."""
        if self.chunk:
            bias = self.weight.new_zeros(()) if self.bias is None else self.bias
            return _ChunkedLoss.apply(x, self.weight, bias, targets, self.softcap, self.chunk)
        logits = self.logits(x).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")

    def token_losses(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and likeliest class of each token: (N,) float32, (N,); no gradient."""
        losses, best = [], []
        size = self.chunk or len(x)
        for part, wanted in zip(x.split(size), targets.split(size), strict=True):
            look = inspect(self.logits(part).float(), wanted)
            losses.append(look.loss)
            best.append(look.best)
        return torch.cat(losses), torch.cat(best)

    def score(self, x: Tensor, targets: Tensor, per_token: bool = False) -> Tensor | TokenScores:
        """Mean loss or `TokenScores` of features `x` (B, T, D), as `score` makes them of logits."""
        flat, labels = x.flatten(0, 1), targets.flatten()
        if not per_token:
            return self.sum_loss(flat, labels) / (labels >= 0).sum()
        loss, best = self.token_losses(flat, labels)
        return TokenScores(loss.view_as(targets), best.view_as(targets) == targets)


class Inspection(NamedTuple):
    """What there is to say of the logits of N tokens; each (N,).

    Attributes:
        loss: Cross-entropy in nats; 0 where the target is -1.
        top: Log-probability of the likeliest class.
        best: The likeliest class.
        total: Logarithm of the sum of all exponentials.
    """

    loss: Tensor
    top: Tensor
    best: Tensor
    total: Tensor


def inspect(logits: Tensor, targets: Tensor, *, classes: int | None = None) -> Inspection:
    """Look at `logits` (N, V) float32, which are written over, and targets (N,).

    The likeliest class is looked for among the first `classes`. Few passes over the logits, for
    their size is what takes the time.
    """
    wanted = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    top, best = logits[:, :classes].max(-1)
    total = top + logits.sub_(top[:, None]).exp_().sum(-1).log()
    return Inspection(torch.where(targets >= 0, total - wanted, 0.0), top - total, best, total)


class _ChunkedLoss(torch.autograd.Function):
    """Cross-entropy of a linear classifier whose logits never exist all at once.

    The gradient is made in the forward pass, chunk by chunk, from the same logits as the loss; so
    nothing is computed twice. Equal to `Classes` without chunks but for rounding.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, cap: float, chunk: int
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            low_x, low_weight = x.to(dtype), weight.to(dtype)
            total = x.new_zeros((), dtype=torch.float32)
            grad_x = torch.empty_like(low_x)
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
            z = low_x.new_empty((min(chunk, len(x)), len(weight)), dtype=torch.float32)
            for start in range(0, len(x), chunk):
                rows = slice(start, start + chunk)
                part, logits = low_x[rows], z[: len(low_x[rows])]
                logits.copy_(part @ low_weight.T)
                loss, grad = _loss_and_gradient(logits, bias, targets[rows], cap)
                total += loss
                grad = grad.to(dtype)
                torch.mm(grad, low_weight, out=grad_x[rows])
                grad_weight += grad.T @ part
        ctx.save_for_backward(grad_x.to(x.dtype), grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * scale, grad_weight * scale, None, None, None, None


def _loss_and_gradient(
    z: Tensor, bias: Tensor, targets: Tensor, cap: float
) -> tuple[Tensor, Tensor]:
    """Summed loss, and its gradient by the raw logits `z` (N, V), which it is written over."""
    slope = None
    if cap:
        slope = z.div_(cap).tanh_().square()
        z.mul_(cap)
    z += bias
    counted = targets >= 0
    row, column = torch.arange(len(z), device=z.device), targets.clamp(min=0)
    wanted, top = z[row, column], z.amax(-1, keepdim=True)
    total = z.sub_(top).exp_().sum(-1, keepdim=True)
    loss = torch.where(counted, (total.log() + top).squeeze(1) - wanted, 0.0).sum()
    z.div_(total)
    z[row, column] -= 1.0
    z *= counted[:, None]
    if slope is not None:
        z.mul_(slope.neg_().add_(1))
    return loss, z
