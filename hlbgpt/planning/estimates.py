"""What a run will need, told from its shapes alone: memory, and time on a GPU that is not here.

The network lies on the meta device and is run with torch's fake tensors, which have shapes but no
memory, so that one of any size can be planned anywhere. Bytes of weights, gradients and optimizer
state are exact; the rest is estimated.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from hlbgpt.models import AdaptiveHead, Network
from hlbgpt.optim import parameter_groups
from hlbgpt.utils.hardware import Card

# Assumed share of a GPU's peak that a compiled network reaches, FLOPs counted as
# `Network.flops_per_token` does. With it, 8 layers of width 384 at 1024 tokens take 1.6 s (full
# head) and 1.0 s (adaptive) for a million tokens on an A100, where a roofline kernel by kernel has
# 1.54 and 1.01; public speedruns report 45 to 50%.
EFFICIENCY = 0.48
# What is kept for the backward pass is written and read, and so is its gradient.
TRAFFIC = 4
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Fixed(NamedTuple):
    """What a run takes whatever its batches, in bytes, and the FLOPs of an optimizer step.

    Of an optimizer that cannot be told, `optimizer` is None and `flops` 0.
    """

    weights: int
    gradients: int
    optimizer: int | None
    flops: int

    def seconds(self, card: Card) -> float:
        """Of an optimizer step: all is read, and all but gradients written; then its products."""
        moved = 2 * self.weights + self.gradients + 2 * (self.optimizer or 0)
        return moved / card.bandwidth + self.flops / (card.flops * EFFICIENCY)


class Activations(NamedTuple):
    """Bytes that a micro-batch takes: what autograd keeps, and the largest tensor of it."""

    kept: int
    largest: int

    @property
    def peak(self) -> int:
        """With the gradient of the largest, the logits mostly, where the backward pass begins."""
        return self.kept + self.largest


def fixed_costs(net: Network, optimizer: Callable[[Any], Optimizer]) -> Fixed:
    """Of `net`, and of its optimizer, which makes a step on tensors without memory."""
    groups = parameter_groups(net)
    state, flops = None, 0
    with FakeTensorMode():
        for group in groups:
            group["params"] = [nn.Parameter(_stand_in(tensor)) for tensor in group["params"]]
            for parameter in group["params"]:
                parameter.grad = torch.empty_like(parameter)
        built = optimizer(groups)
        with suppress(NotImplementedError, RuntimeError):  # it asks for numbers: there are none
            with FlopCounterMode(display=False) as counter:
                built.step()
            state = _bytes(value for kept in built.state.values() for value in kept.values())
            flops = counter.get_total_flops()
    gradients = _bytes(net.parameters())
    return Fixed(gradients + _bytes(net.buffers()), gradients, state, flops)


def _bytes(values: Any) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def activation_bytes(
    net: Network, batch_size: int, sequence_length: int, *, precision: str
) -> Activations:
    """What the forward pass of a training batch keeps for the backward pass.

    As autograd keeps it without `torch.compile`, which keeps less.
    """
    _settle_shares(net)
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    dtype = _AUTOCAST.get(precision, torch.float32)
    # As if on a CPU, for on the meta device there is no autocast.
    with FakeTensorMode():
        own = {name: _stand_in(tensor) for name, tensor in _tensors(net).items()}
        tokens = torch.zeros(batch_size, sequence_length + 1, dtype=torch.int64, device="cpu")
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=dtype, enabled=precision in _AUTOCAST),
        ):
            functional_call(net, own, (tokens[:, :-1], tokens[:, 1:]))
        for tensor in own.values():
            kept.pop(tensor.untyped_storage()._cdata, None)
        sizes = [storage.nbytes() for storage in kept.values()]
    return Activations(sum(sizes), max(sizes, default=0))


def _settle_shares(net: nn.Module) -> None:
    """Give heads without `shares` those they expect: without a text no batch can be counted."""
    for module in net.modules():
        if isinstance(module, AdaptiveHead) and module.shares is None:
            module.shares = module.expected_shares()


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def _stand_in(tensor: Tensor) -> Tensor:
    size, dtype = tensor.shape, tensor.dtype
    return torch.empty(size, dtype=dtype, device="cpu", requires_grad=tensor.requires_grad)


class Cost(NamedTuple):
    """What a micro-batch, forward and backward, asks of a GPU."""

    flops: float
    moved: float

    def seconds(self, card: Card) -> float:
        """By the roofline: products or memory, whichever takes longer."""
        return max(self._products(card), self.moved / card.bandwidth)

    def bound(self, card: Card) -> str:
        return "products" if self._products(card) >= self.moved / card.bandwidth else "memory"

    def _products(self, card: Card) -> float:
        return self.flops / (card.flops * EFFICIENCY)


def micro_batch_cost(
    net: Network, batch_size: int, sequence_length: int, *, fixed: Fixed, kept: Activations
) -> Cost:
    """Of `batch_size` windows of `sequence_length` predicted tokens."""
    tokens = batch_size * sequence_length
    # Weights are read forward and backward; gradients are added to.
    moved = TRAFFIC * kept.kept + 2 * fixed.weights + 2 * fixed.gradients
    return Cost(tokens * net.flops_per_token(sequence_length), moved)
