"""From features to what training and evaluation need, so that logits stay inside a network.

Shapes: B sequences, T tokens, N = B x T, D width, V classes.
"""

from collections.abc import Iterator
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
        if self.softcap and not torch.is_grad_enabled():  # in place, where their size matters most
            logits = logits.float().div_(self.softcap).tanh_().mul_(self.softcap)
        elif self.softcap:
            logits = self.softcap * torch.tanh(logits.float() / self.softcap)
        return logits if self.bias is None else logits.float() + self.bias

    def sum_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of `x` (N, D) against `targets` (N,), summed; float32."""
        return (
            self._chunked(_ChunkedLoss, x, targets) if self.chunk else self.losses(x, targets).sum()
        )

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of each of `x` (N, D) against `targets` (N,): (N,) float32."""
        if self.chunk:
            return self._chunked(_TokenLosses, x, targets)
        logits = self.logits(x).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")

    def _chunked(self, kind: type[torch.autograd.Function], x: Tensor, targets: Tensor) -> Tensor:
        bias = self.weight.new_zeros(()) if self.bias is None else self.bias
        return kind.apply(x, self.weight, bias, targets, self.softcap, self.chunk)

    def token_losses(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and likeliest class of each token: (N,) float32, (N,); no gradient."""
        losses, best = [], []
        size = self.chunk or len(x)
        for part, wanted in zip(x.split(size), targets.split(size), strict=True):
            logits = self.logits(part).float()
            target = logits.gather(1, wanted.clamp(min=0)[:, None])
            best.append(logits.argmax(-1))
            losses.append((exponentials_(logits)[1] - target)[:, 0].where(wanted >= 0, 0.0))
        return torch.cat(losses), torch.cat(best)

    def score(self, x: Tensor, targets: Tensor, per_token: bool = False) -> Tensor | TokenScores:
        """Mean loss or `TokenScores` of features `x` (B, T, D), as `score` makes them of logits."""
        flat, labels = x.flatten(0, 1), targets.flatten()
        if not per_token:
            return self.sum_loss(flat, labels) / (labels >= 0).sum()
        loss, best = self.token_losses(flat, labels)
        return TokenScores(loss.view_as(targets), best.view_as(targets) == targets)


def exponentials_(z: Tensor) -> tuple[Tensor, Tensor]:
    """Write exp(z - greatest) over `z` (..., V): the greatest, and the log of the sum; (..., 1).

    In few passes over the logits, for their size is what takes the time.
    """
    top = z.amax(-1, keepdim=True)
    return top, top + z.sub_(top).exp_().sum(-1, keepdim=True).log()


class _ChunkedLoss(torch.autograd.Function):
    """Cross-entropy of a linear classifier whose logits never exist all at once.

    The gradient is made in the forward pass, chunk by chunk, from the same logits as the loss; so
    nothing is computed twice. Equal to `Classes` without chunks but for rounding.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, cap: float, chunk: int
    ) -> Tensor:
        low_x, low_weight = _for_products(x), _for_products(weight)
        total = x.new_zeros((), dtype=torch.float32)
        grad_x, grad_weight = torch.empty_like(low_x), torch.zeros_like(weight, dtype=torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            for rows, losses, grad in _chunks(low_x, low_weight, bias, targets, cap, chunk):
                total += losses.sum()
                torch.mm(grad, low_weight, out=grad_x[rows])
                grad_weight += grad.T @ low_x[rows]
        ctx.save_for_backward(grad_x.to(x.dtype), grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * scale, grad_weight * scale, None, None, None, None


class _TokenLosses(torch.autograd.Function):
    """As `_ChunkedLoss`, for each token, so that tokens may count more or less.

    How much is known in the backward pass only: until then the gradient by the logits is kept, in
    the precision of the products.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, cap: float, chunk: int
    ) -> Tensor:
        low_x, low_weight = _for_products(x), _for_products(weight)
        all_losses = x.new_empty(len(x), dtype=torch.float32)
        grads = low_x.new_empty(len(x), len(weight))
        with torch.autocast(x.device.type, enabled=False):
            for rows, losses, grad in _chunks(low_x, low_weight, bias, targets, cap, chunk):
                all_losses[rows], grads[rows] = losses, grad
        ctx.save_for_backward(low_x, low_weight, grads)
        ctx.dtypes = x.dtype, weight.dtype
        return all_losses

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, grads = ctx.saved_tensors
        scale = scale[:, None]
        with torch.autocast(x.device.type, enabled=False):
            grad_x, grad_weight = (grads @ weight) * scale, grads.T @ (x * scale).to(x.dtype)
        return grad_x.to(ctx.dtypes[0]), grad_weight.to(ctx.dtypes[1]), None, None, None, None


def _for_products(x: Tensor) -> Tensor:
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)


def _chunks(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, cap: float, chunk: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each chunk of tokens its rows, losses, and gradient by the logits in x's precision."""
    z = x.new_empty((min(chunk, len(x)), len(weight)), dtype=torch.float32)
    for start in range(0, len(x), chunk):
        rows = slice(start, start + chunk)
        logits = z[: len(x[rows])].copy_(x[rows] @ weight.T)
        losses, grad = _losses_and_gradient(logits, bias, targets[rows], cap)
        yield rows, losses, grad.to(x.dtype)


def _losses_and_gradient(
    z: Tensor, bias: Tensor, targets: Tensor, cap: float
) -> tuple[Tensor, Tensor]:
    """Losses (N,), and their gradient by the raw logits `z` (N, V), which it is written over."""
    slope = None
    if cap:
        slope = z.div_(cap).tanh_().square()
        z.mul_(cap)
    z += bias
    counted = targets >= 0
    row, column = torch.arange(len(z), device=z.device), targets.clamp(min=0)
    wanted, top = z[row, column], z.amax(-1, keepdim=True)
    total = z.sub_(top).exp_().sum(-1, keepdim=True)
    loss = torch.where(counted, (total.log() + top).squeeze(1) - wanted, 0.0)
    z.div_(total)
    z[row, column] -= 1.0
    z *= counted[:, None]
    if slope is not None:
        z.mul_(slope.neg_().add_(1))
    return loss, z
