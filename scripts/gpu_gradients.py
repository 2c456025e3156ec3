"""Is a compiled network right? Compare its gradients and losses with those in float32.

Shapes: B windows, T predicted tokens of a window.
"""

import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hlbgpt.models import AdaptiveSoftmax, Network, token_scores

GRADIENT_BOUND = 0.1  # relative error of a gradient
EAGER_FACTOR = 3  # or so many times the error of the eager network, for noisy gradients
LOSS_BOUND = 0.005  # relative error of a loss
SUM_BOUND = 1e-3  # distance of a sum of probabilities from 1
BOUNDS = (
    f"bounds: losses within {LOSS_BOUND:.1%} of float32, relative errors of gradients up to "
    f"{GRADIENT_BOUND} or {EAGER_FACTOR} times the eager network's, sums of probabilities within "
    f"{SUM_BOUND} of 1"
)
_WORST = 6  # gradients named for each shape
_REFERENCE_TOKENS = 8192  # of a micro-batch in float32

Gradients = dict[str, Tensor]
Context = Callable[[], AbstractContextManager[Any]]  # sets the precision of a forward pass


def compare_gradients(net: Network, batch: Tensor, context: Context) -> dict[str, Any]:
    """Compare the loss and gradients of a micro-batch (B, T + 1) int64 with those in float32.

    `net` runs compiled, if it is, and eagerly, both under `context`.
    """
    losses, gradients = [], []
    calls: list[Callable[..., Tensor]] = [net, net.forward]
    for call in calls:
        with context():
            loss = call(batch[:, :-1], batch[:, 1:])
        loss.backward()
        losses.append(loss.item())
        gradients.append(_take_gradients(net))
    exact, reference = reference_gradients(net, batch)
    compiled, eager = (relative_errors(found, reference) for found in gradients)
    worst = sorted(compiled, key=lambda name: -compiled[name])[:_WORST]
    right = all(
        error <= max(GRADIENT_BOUND, EAGER_FACTOR * eager[name]) for name, error in compiled.items()
    )
    return {
        "windows x tokens": (batch.shape[0], batch.shape[1] - 1),
        "loss, compiled": losses[0],
        "eager": losses[1],
        "float32": exact,
        "passed": right and _is_close(losses[0], exact),
        "worst gradients: error compiled (eager)": ", ".join(
            f"{name} {compiled[name]:.3f} ({eager[name]:.3f})" for name in worst
        ),
    }


def _is_close(loss: float, reference: float) -> bool:
    return abs(loss - reference) < LOSS_BOUND * abs(reference)  # False for NaN, and for zeros


def _take_gradients(net: Network) -> Gradients:
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    return found


def reference_gradients(net: Network, batch: Tensor) -> tuple[float, Gradients]:
    """Loss and gradients in float32, eager, in small micro-batches and without a `capacity`."""
    heads = [module for module in net.modules() if isinstance(module, AdaptiveSoftmax)]
    capacities, loss = [head.capacity for head in heads], 0.0
    # Such gradients depend on what else is in the micro-batch.
    whole = any(getattr(module, "scale_grad_by_freq", False) for module in net.modules())
    rows = len(batch) if whole else max(1, _REFERENCE_TOKENS // (batch.shape[1] - 1))
    for head in heads:
        head.capacity = None
    for part in batch.split(rows):
        share = net.forward(part[:, :-1], part[:, 1:]) * (len(part) / len(batch))
        share.backward()
        loss += share.item()
    for head, capacity in zip(heads, capacities, strict=True):
        head.capacity = capacity
    return loss, _take_gradients(net)


def relative_errors(found: Gradients, reference: Gradients) -> dict[str, float]:
    """|found - reference| / |reference|, for parameters of the same name in all blocks together.

    Together, because the gradient of a block's scalar may be almost zero by chance.
    """
    squares: dict[str, Any] = {}
    for name, gradient in reference.items():
        key, difference = re.sub(r"\.\d+\.", ".*.", name), found[name].float() - gradient
        pair = torch.stack([difference.square().sum(), gradient.square().sum()])
        squares[key] = squares.get(key, 0) + pair
    tiny = torch.finfo(torch.float32).tiny
    return {name: math.sqrt(a / (b + tiny)) for name, (a, b) in squares.items()}


@torch.no_grad()
def compare_evaluation(net: Network, batch: Tensor, context: Context) -> dict[str, Any]:
    """Compare the losses of an evaluation batch (B, T + 1) int64 with those in float32.

    Also the loss of the first window with that from its probabilities, which must add up to 1.
    """
    net.eval()
    with context():
        compiled = _mean(token_scores(net, batch).loss, batch)
    inputs, targets = batch[:, :-1].clamp(min=0), batch[:, 1:]
    losses = net.forward(inputs, targets, per_token=True).loss
    log_probs = net.forward(inputs[:1]).float()  # (1, T, V)
    if not any(isinstance(module, AdaptiveSoftmax) for module in net.modules()):
        log_probs = log_probs.log_softmax(-1)  # these networks return logits
    direct = -log_probs.gather(-1, targets[:1, :, None].clamp(min=0))[..., 0]
    distance = (log_probs.double().exp().sum(-1) - 1).abs().max().item()
    exact, first = _mean(losses, batch), _mean(losses[:1], batch[:1])
    from_probs = _mean(direct, batch[:1])
    net.train()
    right = _is_close(compiled, exact) and _is_close(from_probs, first) and distance <= SUM_BOUND
    return {
        "loss, compiled": compiled,
        "float32": exact,
        "first window": first,
        "the same from probabilities": from_probs,
        "distance of their sum from 1": distance,
        "passed": right,
    }


def _mean(losses: Tensor, batch: Tensor) -> float:
    """Mean of `losses` (B, T) over the tokens to predict in `batch` (B, T + 1)."""
    valid = batch[:, 1:] >= 0
    return (losses.double().where(valid, 0.0).sum() / valid.sum()).item()
