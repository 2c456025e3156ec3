"""A network that a file describes is no larger than the file's weights, or is not built."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from hlbgpt.utils.errors import InputError

# Tensors may be registered more than once, as tied ones are, or be computed anew, as the sines
# of positions are.
_MORE_TENSORS, _MORE_VALUES = 1000, 1 << 26


def build_for_weights(
    make: Callable[..., Any], weights: Mapping[str, Tensor], name: str, **settings: Any
) -> Any:
    """`make(**settings)`, a network, unless it needs much more than `weights` hold.

    Networks of this package are built without memory first, because a tensor is made before it can
    be counted.

    Args:
        make: The network's class.
        weights: Those of the file, which may be of more modules than the network.
        name: What the file is called in the error.
    """
    with limited_size(weights, name):
        if make.__module__.partition(".")[0] == "hlbgpt":
            with torch.device("meta"):
                make(**settings)
    with limited_size(weights, name):
        return make(**settings)


@contextlib.contextmanager
def limited_size(weights: Mapping[str, Tensor], name: str) -> Iterator[None]:
    """Raise InputError as soon as modules register much more tensors than `weights`."""
    tensors = 2 * len(weights) + _MORE_TENSORS
    values = 2 * sum(tensor.numel() for tensor in weights.values()) + _MORE_VALUES

    def count(module: nn.Module, key: str, tensor: Any) -> None:
        nonlocal tensors, values
        tensors -= 1
        values -= tensor.numel() if isinstance(tensor, Tensor) else 0
        if tensors < 0 or values < 0:
            raise InputError(
                f"{name} is of another network: the settings describe one that is much larger than "
                "its weights; use weights and settings of one run"
            )

    with (
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ):
        yield
