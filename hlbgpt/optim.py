"""Parameter groups as a table."""

from collections.abc import Callable
from typing import Any

from torch import nn

# The first rule that fits a parameter's name and dimensions decides.
_GROUPS: tuple[tuple[str, Callable[[str, nn.Parameter], bool]], ...] = (
    ("block_matrices", lambda name, p: p.ndim >= 2 and name.startswith("blocks.")),
    ("embeddings", lambda _, p: p.ndim >= 2),  # input, positions and output
    ("vectors", lambda _, p: p.ndim < 2),  # norms, biases, scalars
)


def parameter_groups(net: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters of `net`, each in one group, for any torch optimizer.

    Only block matrices take the weight decay given to the optimizer. Groups without a parameter
    are left out.
    """
    groups: dict[str, dict[str, Any]] = {
        name: {"params": [], "name": name, **({} if name == "block_matrices" else {"weight_decay": 0.0})}
        for name, _ in _GROUPS
    }
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            group = next(group for group, fits in _GROUPS if fits(name, parameter))
            groups[group]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
