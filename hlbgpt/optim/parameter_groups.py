"""Parameter groups as a table."""

from collections.abc import Callable
from typing import Any

from torch import nn


def _is_block_matrix(name: str) -> bool:
    """The pointer's are alike; tables of values in a block are embeddings."""
    return name.startswith(("blocks.", "pointer.")) and not name.endswith("_table.weight")


# Name, settings of its own, and which parameters: the first rule that fits decides.
_GROUPS: tuple[tuple[str, dict[str, Any], Callable[[str, nn.Parameter], bool]], ...] = (
    ("slopes", {"weight_decay": 0.0}, lambda name, p: name.endswith(".slope")),  # of positions
    ("block_matrices", {}, lambda name, p: p.ndim >= 2 and _is_block_matrix(name)),
    ("bigrams", {"weight_decay": 0.0}, lambda name, p: name.startswith("bigrams.")),
    ("head", {"weight_decay": 0.0}, lambda name, p: p.ndim >= 2 and name.startswith("head.")),
    ("embeddings", {"weight_decay": 0.0}, lambda _, p: p.ndim >= 2),  # input, positions, tied head
    ("vectors", {"weight_decay": 0.0}, lambda _, p: p.ndim < 2),  # norms, biases, scalars
)


def parameter_groups(net: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters of `net`, each in one group, for any torch optimizer.

    Only block matrices take the weight decay given to the optimizer. Groups without a parameter
    are left out.
    """
    groups: dict[str, dict[str, Any]] = {
        name: {"params": [], "name": name, **settings} for name, settings, _ in _GROUPS
    }
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            group = next(group for group, _, fits in _GROUPS if fits(name, parameter))
            groups[group]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
