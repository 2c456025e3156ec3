"""The optimizer: Muon for the matrices of the blocks, AdamW for everything else.

Shapes: M matrices of R rows and C columns.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from hlbgpt.optim.parameter_groups import RULES


def newton_schulz(
    matrices: Tensor, *, steps: int = 5, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Approximate the nearest semi-orthogonal matrices, (M, R, C), by Newton-Schulz iteration.

    The coefficients are those of Keller Jordan's Muon. They bring singular values to between about
    0.7 and 1.2, which is enough for an update and takes few matrix products in bf16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    # Products of matrices that are not contiguous take twice as long.
    x = (matrices.mT if tall else matrices).to(dtype).contiguous()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def muon_update(
    matrices: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """Update M matrices (R, C) in place by a step of Muon (github.com/KellerJordan/Muon).

    `momenta` are running means of the gradients, updated in place. The update looks ahead, as
    Nesterov's does, and the weight decay is decoupled.
    """
    torch._foreach_lerp_(momenta, gradients, 1 - momentum)
    updates = newton_schulz(torch.stack(torch._foreach_lerp(gradients, momenta, momentum)))
    updates = updates.to(matrices[0].dtype)
    if weight_decay:
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
    rows, columns = matrices[0].shape
    scale = max(1.0, rows / columns) ** 0.5
    torch._foreach_add_(matrices, list(updates.unbind()), alpha=-lr * scale)


class MuonAdamW(Optimizer):
    """Updates each parameter group with Muon or with AdamW.

    Args:
        params: Groups as `parameter_groups` makes them.
        groups: Settings of single groups by name: `method` (`muon` or `adamw`; `adamw` by default)
            and any of the settings below.
        lr: Learning rate.
        betas: AdamW's betas.
        eps: AdamW's epsilon.
        weight_decay: Decoupled weight decay: a step multiplies weights by 1 - lr * weight_decay.
        momentum: Muon's Nesterov momentum.

    Raises:
        ValueError: A group or setting is unknown, or a value is out of range.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        groups: dict[str, dict[str, Any]] = {},  # noqa: B006 (never changed)
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        defaults = {
            "method": "adamw",
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "fused": True,  # tells load_state_dict to keep `step` on the device and in fp32
        }
        for name in groups.keys() - RULES.keys():
            raise ValueError(f"groups: no group {name!r}; use {', '.join(sorted(RULES))}")
        for name, settings in groups.items():
            if unknown := settings.keys() - defaults.keys():
                raise ValueError(f"groups.{name}: no setting {min(unknown)!r}")
        merged = [{**group, **groups.get(str(group.get("name")), {})} for group in params]
        for group in merged:
            _check_settings(f"groups.{group.get('name', 'all')}", {**defaults, **group})
        super().__init__(merged, defaults)
        for group in self.param_groups:
            group["betas"] = tuple(group["betas"])  # YAML has lists

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._muon if group["method"] == "muon" else self._adamw)(group, params)
        return loss

    def _muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for param in params:
            by_shape.setdefault(param.shape, []).append(param)
        for matrices in by_shape.values():
            muon_update(
                matrices,
                _gradients(matrices),
                self._buffers(matrices, "momentum_buffer"),
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
            )

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        adamw(
            params,
            _gradients(params),
            self._buffers(params, "exp_avg"),
            self._buffers(params, "exp_avg_sq"),
            [],
            self._buffers(params, "step"),
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )

    def _buffers(self, params: list[Tensor], name: str) -> list[Tensor]:
        """The state called `name` of each parameter: zeros at first, and for `step` a scalar."""
        for param in params:
            if name not in self.state[param]:
                self.state[param][name] = (
                    torch.zeros((), dtype=torch.float32, device=param.device)
                    if name == "step"
                    else torch.zeros_like(param)
                )
        return [self.state[param][name] for param in params]


def _gradients(params: list[Tensor]) -> list[Tensor]:
    return [param.grad for param in params if param.grad is not None]


def _check_settings(name: str, group: dict[str, Any]) -> None:
    if group["method"] not in ("muon", "adamw"):
        raise ValueError(f"{name}: method {group['method']!r} is neither 'muon' nor 'adamw'")
    if group["method"] == "muon" and any(param.ndim != 2 for param in group["params"]):
        raise ValueError(f"{name}: muon is for matrices; use adamw")
    for key in ("lr", "eps", "weight_decay"):
        if not group[key] >= 0:
            raise ValueError(f"{name}: {key} {group[key]} is not 0 or more")
    for key, values in {"betas": group["betas"], "momentum": [group["momentum"]]}.items():
        if not all(0 <= value < 1 for value in values):
            raise ValueError(f"{name}: {key} {group[key]} is not within [0, 1)")
    if len(group["betas"]) != 2:
        raise ValueError(f"{name}: betas {group['betas']} are not two numbers")
