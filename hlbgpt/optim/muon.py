"""The optimizer: Muon for the matrices of the blocks, AdamW for everything else.

Shapes: M matrices of R rows and C columns.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hlbgpt.optim.parameter_groups import RULES
from hlbgpt.optim.ranks import Orthogonalize, local_shards, shard_group, share_out


def newton_schulz(
    matrices: Tensor, *, steps: int = 5, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Approximate the nearest semi-orthogonal matrices, (M, R, C), by Newton-Schulz iteration.

    The coefficients are those of Keller Jordan's Muon. They bring singular values to between about
    0.7 and 1.2, which is enough for an update and takes few matrix products in bf16. It is fastest
    with R <= C. Rows of zeros stay zero and change nothing else.
    """
    # An iteration makes aX + bAX + cA²X with A = XXᵀ, which is kX + c(A + sI)²X: two products and
    # one in place, since adding to a product out of place copies it first.
    a, b, c = 3.4445, -4.7750, 2.0315
    s, k = b / (2 * c), a - b**2 / (4 * c)
    norms = matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7
    x = torch.div(matrices, norms, out=torch.empty_like(matrices, dtype=dtype))
    shift = x.new_zeros(*x.shape[:-1], x.shape[-2])  # sI
    shift.diagonal(dim1=-2, dim2=-1).fill_(s)
    for _ in range(steps):
        shifted = shift.clone().baddbmm_(x, x.mT)
        x.baddbmm_(shifted, shifted @ x, beta=k, alpha=c)
    return x


def orthogonalize(matrices: list[Tensor]) -> list[Tensor]:
    """`newton_schulz` of matrices (R, C) of any shapes, in as few kernels as possible.

    Matrices whose longer sides are equal make one batch: tall ones are transposed, and short ones
    filled up with rows of zeros.
    """
    results = list(matrices)
    batches: dict[int, list[int]] = {}
    for i, matrix in enumerate(matrices):
        batches.setdefault(max(matrix.shape), []).append(i)
    for columns, batch in batches.items():
        wide = [i for i in batch if matrices[i].shape[1] == columns]
        tall = [i for i in batch if matrices[i].shape[1] < columns]
        rows = max(min(matrices[i].shape) for i in batch)
        parts = []
        for matrix in [*(matrices[i] for i in wide), *(matrices[i].mT for i in tall)]:
            parts.append(matrix)
            if len(matrix) < rows:
                parts.append(matrix.new_zeros(rows - len(matrix), columns))
        done = newton_schulz(torch.cat(parts).view(len(batch), rows, columns))
        for members, result in ((wide, done[: len(wide)]), (tall, done[len(wide) :].mT)):
            full = result.to(parts[0].dtype, memory_format=torch.contiguous_format)
            for i, matrix in zip(members, full, strict=True):
                results[i] = matrix[: matrices[i].shape[0], : matrices[i].shape[1]]
    return results


def muon_update(
    matrices: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    shapes: list[torch.Size] | None = None,
    compute: Orthogonalize = orthogonalize,
) -> None:
    """Update matrices (R, C) of any shapes in place by a step of Muon.

    `momenta` are running means of the gradients, updated in place. The update looks ahead, as
    Nesterov's does, and the weight decay is decoupled. Of sharded matrices, `matrices` are the
    shards of this rank, `shapes` those of the whole, and `compute` orthogonalizes across ranks.
    Source: github.com/KellerJordan/Muon.
    """
    torch._foreach_lerp_(momenta, gradients, 1 - momentum)
    updates = compute(list(torch._foreach_lerp(gradients, momenta, momentum)))
    if weight_decay:
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
    by_scale: dict[float, list[int]] = {}
    for i, (rows, columns) in enumerate(shapes or [matrix.shape for matrix in matrices]):
        by_scale.setdefault(max(1.0, rows / columns) ** 0.5, []).append(i)
    for scale, members in by_scale.items():
        chosen, steps = ([every[i] for i in members] for every in (matrices, updates))
        torch._foreach_add_(chosen, steps, alpha=-lr * scale)


_METHODS = {"block_matrices": {"method": "muon"}}  # of groups that do not use AdamW by default


class MuonAdamW(Optimizer):
    """Updates each parameter group with Muon or with AdamW.

    The parameters of a group have one dtype and are on one device. In a distributed run all ranks
    call `step` together, and Muon's work is shared out over them; see `ranks.py`. Their weights
    and gradients are equal, or shards of one weight; the state is sharded like the weights.

    Args:
        params: Groups as `parameter_groups` makes them.
        groups: Settings of single groups by name: `method` (`muon` or `adamw`; by default `muon`
            for `block_matrices`, and `adamw` for the others) and any of the settings below.
        lr: Learning rate of the groups without one of their own. If none has one, 1e-3 is the
            default.
        betas: AdamW's betas.
        eps: AdamW's epsilon.
        weight_decay: Decoupled weight decay: a step multiplies weights by 1 - lr * weight_decay.
        momentum: Muon's Nesterov momentum.

    Raises:
        ValueError: A group or setting is unknown, a value is out of range, or only some of the
            groups have a learning rate.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        groups: dict[str, dict[str, Any]] = {},  # noqa: B006 (never changed)
        lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        defaults = {
            "method": "adamw",
            "lr": 1e-3 if lr is None else lr,
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
        merged = []
        for group in params:
            name = str(group.get("name"))
            merged.append({**_METHODS.get(name, {}), **group, **groups.get(name, {})})
        without = [str(group.get("name")) for group in merged if "lr" not in group]
        if lr is None and 0 < len(without) < len(merged):
            raise ValueError(
                f"groups: no lr for {', '.join(without)}; set lr for all groups or for each "
                "(groups in a config file replace all of an earlier file's)"
            )
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
        active = [
            (group, params)
            for group in self.param_groups
            if (params := [p for p in group["params"] if p.grad is not None])
        ]
        adamw = [params for group, params in active if group["method"] == "adamw"]
        if steps := [step for params in adamw for step in self._buffers(params, "step")]:
            torch._foreach_add_(steps, 1)  # those of all groups in one kernel
        for group, params in active:
            (self._muon if group["method"] == "muon" else self._adamw)(group, params)
        return loss

    def _muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        muon_update(
            local_shards(params),
            _gradients(params),
            self._buffers(params, "momentum_buffer"),
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            shapes=[param.shape for param in params],
            compute=share_out(orthogonalize, params),
        )

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        torch._fused_adamw_(
            local_shards(params),
            _gradients(params),
            self._buffers(params, "exp_avg"),
            self._buffers(params, "exp_avg_sq"),
            [],
            self._buffers(params, "step"),
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )

    def _buffers(self, params: list[Tensor], name: str) -> list[Tensor]:
        """The state called `name` of each parameter: zeros at first, and for `step` a scalar.

        It is sharded like the parameter, and returned are the shards of this rank.
        """
        for param in params:
            if name not in self.state[param]:
                self.state[param][name] = (
                    torch.zeros((), dtype=torch.float32, device=param.device)
                    if name == "step"
                    else torch.zeros_like(param)
                )
        return local_shards([self.state[param][name] for param in params])


def _gradients(params: list[Tensor]) -> list[Tensor]:
    return local_shards([param.grad for param in params if param.grad is not None])


def _check_settings(name: str, group: dict[str, Any]) -> None:
    if group["method"] not in ("muon", "adamw"):
        raise ValueError(f"{name}: method {group['method']!r} is neither 'muon' nor 'adamw'")
    if group["method"] == "muon":
        if any(param.ndim != 2 for param in group["params"]):
            raise ValueError(f"{name}: muon is for matrices; use adamw")
        if len({shard_group(param) for param in group["params"]}) > 1:
            raise ValueError(f"{name}: muon is for matrices that are sharded alike; use adamw")
    for key in ("lr", "eps", "weight_decay"):
        if not group[key] >= 0:
            raise ValueError(f"{name}: {key} {group[key]} is not 0 or more")
    for key, values in {"betas": group["betas"], "momentum": [group["momentum"]]}.items():
        if not all(0 <= value < 1 for value in values):
            raise ValueError(f"{name}: {key} {group[key]} is not within [0, 1)")
    if len(group["betas"]) != 2:
        raise ValueError(f"{name}: betas {group['betas']} are not two numbers")
