"""The parameter groups of a network, as a table."""

from collections.abc import Callable
from typing import Any

from torch import nn


def _is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a matrix of a product, other than the LM head."""
    inside = name.startswith(("blocks.", "pointer.", "head_proj.", "ngrams."))
    return inside and parameter.ndim >= 2 and not name.endswith(".value_embed.weight")


# Each parameter belongs to the first group whose rule fits its name and shape.
RULES: dict[str, Callable[[str, nn.Parameter], bool]] = {
    "slopes": lambda name, p: name.endswith(".slope"),  # hlb-gpt 0.4.1's attention bias
    "block_matrices": _is_block_matrix,
    "bigram_embedding": lambda name, p: name.startswith("bigram_embedding."),
    "subword_head": lambda name, p: name == "lm_head.subword_embedding.weight",
    "lm_head": lambda name, p: p.ndim >= 2 and name.startswith("lm_head."),
    "embeddings": lambda name, p: p.ndim >= 2,  # tokens, positions, values; also a tied head
    "vectors": lambda name, p: True,  # norms, biases, scalars
}


def parameter_groups(net: nn.Module) -> list[dict[str, Any]]:
    """Sort the trainable parameters of `net` into named groups, for any torch optimizer.

    Only `block_matrices` takes the optimizer's weight decay; in the other groups it is 0. Groups
    without parameters are left out.
    """
    trainable = {name: p for name, p in net.named_parameters() if p.requires_grad}
    members: dict[str, list[nn.Parameter]] = {group: [] for group in RULES}
    for name, parameter in trainable.items():
        group = next(group for group, fits in RULES.items() if fits(name, parameter))
        members[group].append(parameter)
    assert sum(map(len, members.values())) == len(trainable)
    return [
        {"name": group, "params": params}
        | ({} if group == "block_matrices" else {"weight_decay": 0.0})
        for group, params in members.items()
        if params
    ]
