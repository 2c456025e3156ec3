"""What a run will need, computed from its settings without training, data or a GPU."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from hlbgpt.cli.main import Built, build
from hlbgpt.models import AdaptiveSoftmax, Network
from hlbgpt.optim import parameter_groups
from hlbgpt.optim.schedules import plan_steps
from hlbgpt.training.checks import require_context
from hlbgpt.utils.errors import InputError

AUTO_TOKENS = 16384  # stands for `schedule.micro_batch_tokens: auto`
_AUTOCAST = {"bf16": torch.bfloat16, "16": torch.float16}


class Shape(NamedTuple):
    """What an optimizer step trains on."""

    sequence_length: int
    micro_batch_size: int
    micro_batches: int


@dataclass(frozen=True)
class Plan:
    """What a run on one device will need."""

    name: str
    net: Network
    steps: dict[Shape, int]  # number of steps of each shape
    memory: dict[str, int]  # bytes, by what takes them

    @property
    def tokens(self) -> int:
        return sum(prod(shape) * steps for shape, steps in self.steps.items())

    @property
    def flops(self) -> float:
        """FLOPs of all steps, counted as by `Network.flops_per_token`."""
        flops = self.net.flops_per_token
        return sum(prod(s) * steps * flops(s.sequence_length) for s, steps in self.steps.items())


def plan_run(words: list[str]) -> Plan:
    """Plan `hlbgpt fit` with these arguments; raises InputError if that is impossible."""
    built = build(words, device="meta")
    steps = _steps(built)
    longest = max(shape.sequence_length for shape in steps)
    require_context(built.net, longest, "data.sequence_length or schedule.table sequence_length")
    largest = max(steps, key=lambda shape: (prod(shape[:2]), shape.sequence_length))
    autocast = _AUTOCAST.get(str(built.config.trainer.precision).removesuffix("-mixed"))
    memory = plan_memory(built.net, built.optimizer, largest, autocast)
    return Plan(built.name, built.net, steps, memory)


def _steps(built: Built) -> dict[Shape, int]:
    """The number of steps of each shape."""
    data, schedule, max_steps = built.config.data, built.schedule, built.config.trainer.max_steps
    if schedule.table:
        size = schedule.micro_batch_tokens
        size = AUTO_TOKENS if size == "auto" else size
        planned = plan_steps(schedule.table, micro_batch_tokens=size)
        shapes = [Shape(s.sequence_length, s.batch_size, s.micro_batches) for s in planned]
        return dict(Counter(shapes[: max_steps if max_steps > 0 else None]))
    shape = Shape(data.sequence_length, data.micro_batch_size, data.micro_batches)
    ends = [end for end in (max_steps, ceil((data.max_tokens or 0) / prod(shape))) if end > 0]
    if not ends:
        raise InputError(f"trainer.max_steps: {max_steps}, and no schedule.table; set one of them")
    return {shape: min(ends)}


def plan_memory(
    net: Network, optimizer: Callable[[Any], Optimizer], shape: Shape, autocast: torch.dtype | None
) -> dict[str, int]:
    """Bytes that a training step takes without torch.compile.

    Runs on fake tensors, which have shapes but no memory, and leaves them in `net`.
    """
    for module in net.modules():  # the default capacity depends on the values of a batch
        if isinstance(module, AdaptiveSoftmax) and module.capacity is None:
            module.capacity = module.expected_capacity()
    saved: dict[int, Any] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        net.to_empty(device="cpu")  # the meta device has no autocast
        tokens = torch.zeros(shape.micro_batch_size, shape.sequence_length + 1, dtype=torch.int64)
        with (
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
            torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None),
        ):
            loss = net(tokens[:, :-1], tokens[:, 1:])
        for tensor in [*net.parameters(), *net.buffers()]:
            saved.pop(tensor.untyped_storage()._cdata, None)
        activations = sum(storage.nbytes() for storage in saved.values())
        loss.backward()
        built = optimizer(parameter_groups(net))
        built.step()
    state = [value for values in built.state.values() for value in values.values()]
    return {
        "weights": sum(tensor.nbytes for tensor in [*net.parameters(), *net.buffers()]),
        "gradients": sum(parameter.nbytes for parameter in net.parameters()),
        "optimizer state": sum(value.nbytes for value in state if isinstance(value, Tensor)),
        "activations": activations,  # saved for the backward pass
    }
