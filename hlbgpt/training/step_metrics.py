"""Metrics of logged optimizer steps."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from hlbgpt.training.fsdp import whole


class StepMetrics:
    """Learning rates and norms of gradients and updates, by parameter group.

    A norm is that of all tensors of a group taken as one vector. To measure an update, the weights
    before the step are kept until the step is made.

    Args:
        norms: Whether to measure norms, which takes time and memory in logged steps.
    """

    def __init__(self, norms: bool) -> None:
        self.norms = norms
        self._before: dict[str, list[Tensor]] = {}

    def before_step(self, optimizer: Optimizer) -> dict[str, Any]:
        """Rates and gradient norms, once the gradients are ready."""
        values: dict[str, Any] = {}
        self._before = {}
        for group in optimizer.param_groups:
            name, params = group.get("name", "all"), group["params"]
            values[f"lr/{name}"] = group["lr"]
            if group.get("method") == "muon":
                values[f"momentum/{name}"] = group["momentum"]
            if self.norms:
                values[f"grad_norm/{name}"] = grad_norm(params)
                self._before[name] = [param.detach().clone() for param in params]
        return values

    def after_step(self, optimizer: Optimizer) -> dict[str, Any]:
        """Norms of the updates; empty unless `before_step` was asked in this step."""
        before, self._before = self._before, {}
        values = {}
        for group in optimizer.param_groups:
            name = group.get("name", "all")
            if (weights := before.get(name)) is not None:
                torch._foreach_sub_(weights, [param.detach() for param in group["params"]])
                values[f"update_norm/{name}"] = total_norm(weights)
        return values


def grad_norm(params: list[Any]) -> Tensor:
    """Norm of the gradients of `params` taken as one vector; a scalar on the device."""
    return total_norm([param.grad for param in params if param.grad is not None])


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Norm of `tensors` taken as one vector; a scalar on the device.

    All ranks must ask, since they exchange the norms of weights that FSDP2 has split.
    """
    return whole(get_total_norm(tensors))


def to_floats(values: dict[str, Any]) -> dict[str, float]:
    """Numbers and scalar tensors as floats; waits for the device once."""
    names = [name for name, value in values.items() if isinstance(value, Tensor)]
    if not names:
        return {name: float(value) for name, value in values.items()}
    scalars = torch.stack([values[name].detach().float() for name in names])
    return {**values, **dict(zip(names, scalars.tolist(), strict=True))}
