"""The one optimizer class: Muon for matrices, AdamW for the rest.

Shapes: M matrices of R rows and C columns.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from hlbgpt.optim.parameter_groups import _GROUPS


class MuonAdamW(Optimizer):
    """Each parameter group by Muon or by AdamW, with settings of its own.

    Muon (github.com/KellerJordan/Muon) takes the direction of the momentum and makes its singular
    values equal, so that every direction of a matrix learns at one speed. Matrices of one shape
    are stacked, and orthogonalised at once.

    Args:
        params: Groups as `parameter_groups` makes them.
        groups: Settings by the group's name: `method` (`muon` or `adamw`), and any of those
            below; a group that is not named takes AdamW with those below.
        lr: Learning rate.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: Decoupled: a step multiplies weights by 1 - lr * weight_decay.
        momentum: Of Muon, with Nesterov's look ahead.

    Raises:
        ValueError: a group or setting of no known name, or a value out of range.
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
            "fused": True,  # lets a restored step count lie on the device, as AdamW's must
        }
        named = [{**group, **groups.get(str(group.get("name")), {})} for group in params]
        known = {name for name, _, _ in _GROUPS}
        for name in groups.keys() - known:
            raise ValueError(f"groups: no group {name!r}; there are {', '.join(sorted(known))}")
        for group in named:
            _require_sane({**defaults, **group}, allowed={*defaults, "params", "name"})
        super().__init__(named, defaults)
        for group in self.param_groups:
            group["betas"] = tuple(group["betas"])  # YAML has lists

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
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
        shapes: dict[tuple[int, int], list[Tensor]] = {}
        for param in params:
            shapes.setdefault((param.shape[0], param.shape[1]), []).append(param)
        for (rows, columns), same in shapes.items():
            momenta = [self._state(param, "momentum_buffer") for param in same]
            gradients = _gradients(same)
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
            updates = orthogonalized(torch.stack(ahead))
            if group["weight_decay"]:
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
            scale = -group["lr"] * max(1.0, rows / columns) ** 0.5
            torch._foreach_add_(same, list(updates.to(same[0].dtype).unbind()), alpha=scale)

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        adamw(
            params,
            _gradients(params),
            [self._state(param, "exp_avg") for param in params],
            [self._state(param, "exp_avg_sq") for param in params],
            [],
            [self._steps(param) for param in params],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state(self, param: Tensor, name: str) -> Tensor:
        state = self.state[param]
        if name not in state:
            state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state[name]

    def _steps(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        return state["step"]


def _gradients(params: list[Tensor]) -> list[Tensor]:
    return [param.grad for param in params if param.grad is not None]


def orthogonalized(
    matrices: Tensor, *, steps: int = 5, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The nearest matrices, roughly, whose singular values are all 1: (M, R, C) in `dtype`.

    Newton-Schulz iteration with the coefficients of Keller Jordan's Muon, which leave singular
    values between about 0.7 and 1.2: enough for an update, in few products of bf16 matrices.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(dtype).contiguous()  # or products take twice as long
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _require_sane(group: dict[str, Any], allowed: set[str]) -> None:
    name = group.get("name", "all")
    if unknown := group.keys() - allowed:
        raise ValueError(f"groups.{name}: no setting {sorted(unknown)[0]!r}")
    method: Literal["muon", "adamw"] = group["method"]
    if method not in ("muon", "adamw"):
        raise ValueError(f"groups.{name}: method {method!r} is neither 'muon' nor 'adamw'")
    if method == "muon" and any(param.ndim != 2 for param in group["params"]):
        raise ValueError(f"groups.{name}: muon is for matrices; use adamw")
    for key in ("lr", "eps", "weight_decay"):
        if not group[key] >= 0:
            raise ValueError(f"groups.{name}: {key} {group[key]} is negative")
    for key, values in {"betas": group["betas"], "momentum": [group["momentum"]]}.items():
        if not all(0 <= value < 1 for value in values):
            raise ValueError(f"groups.{name}: {key} {group[key]} is not within [0, 1)")
