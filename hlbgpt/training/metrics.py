"""What is logged of an optimizer step."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer


class StepLog:
    """The figures of every `trainer.log_every_n_steps`-th step: each costs time, so no other.

    Gradients and updates are measured for each parameter group, as the norm of all its tensors
    taken as one vector. For the updates the weights are kept until the step is made.

    Args:
        norms: Whether to measure groups; without it, only the norm of the whole gradient.
    """

    def __init__(self, norms: bool) -> None:
        self.norms = norms
        self._before: dict[str, list[Tensor]] = {}

    def of_gradients(self, optimizer: Optimizer) -> dict[str, Any]:
        """Norms and rates by group, before the optimizer steps."""
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

    def of_update(self, optimizer: Optimizer) -> dict[str, Any]:
        """Norms of the updates by group, after the step; empty if it was not to be logged."""
        before, self._before = self._before, {}
        values = {}
        for group in optimizer.param_groups:
            name = group.get("name", "all")
            if (was := before.get(name)) is not None:
                torch._foreach_sub_(was, [param.detach() for param in group["params"]])
                values[f"update_norm/{name}"] = get_total_norm(was)
        return values


def grad_norm(params: list[Any]) -> Tensor:
    """Norm of the gradients of `params` taken as one vector; a scalar on the device."""
    return get_total_norm([param.grad for param in params if param.grad is not None])
