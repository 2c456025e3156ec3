"""What a run will need, computed from its settings without training, data or a GPU."""

from collections import Counter
from collections.abc import Callable, Iterable
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
from hlbgpt.utils.hardware import GPU

_AUTO_TOKENS = 16384  # stands for `schedule.micro_batch_tokens: auto`
_AUTOCAST = {"bf16": torch.bfloat16, "16": torch.float16}


class Shape(NamedTuple):
    """What an optimizer step trains on, on each device."""

    sequence_length: int
    micro_batch_size: int
    micro_batches: int


@dataclass(frozen=True)
class Plan:
    """What a run will need: `steps` of each shape, and bytes of `memory` on each device."""

    name: str
    net: Network
    devices: int
    steps: dict[Shape, int]
    memory: dict[str, int]
    notes: list[str]

    @property
    def tokens(self) -> int:
        """Predicted tokens, on all devices."""
        return self.devices * sum(prod(shape) * steps for shape, steps in self.steps.items())

    @property
    def flops(self) -> float:
        """On all devices, counted as by `Network.flops_per_token`."""
        flops = self.net.flops_per_token
        return self.devices * sum(prod(s) * n * flops(s[0]) for s, n in self.steps.items())

    def seconds(self, gpu: GPU) -> tuple[float, float]:
        """Estimate the shortest and longest training time, from no measurement.

        Memory traffic: each micro-batch writes and reads its saved activations and their gradients,
        and passes twice over weights, gradients and optimizer state. It overlaps with matrix
        products at 50% of the GPU's peak, or is added to products at 30%.
        """
        memory = self.memory
        fixed = memory["weights"] + memory["gradients"] + memory["optimizer state"]
        micro_batches = sum(shape.micro_batches * steps for shape, steps in self.steps.items())
        per_token = memory["activations"] / prod(_largest(self.steps)[:2])
        moved = 4 * per_token * self.tokens / self.devices + 2 * fixed * micro_batches
        products, traffic = self.flops / self.devices / gpu.flops, moved / gpu.bandwidth
        return max(products / 0.5, traffic), products / 0.3 + traffic


def _largest(shapes: Iterable[Shape]) -> Shape:
    """The shape whose micro-batches need the most memory."""
    return max(shapes, key=lambda shape: (prod(shape[:2]), shape.sequence_length))


def plan_run(words: list[str]) -> Plan:
    """Plan `hlbgpt fit` with these arguments; raises InputError if that is impossible."""
    built = build(words, device="meta")
    trainer, net = built.config.trainer, built.net
    devices = trainer.num_nodes * (int(trainer.devices) if str(trainer.devices).isdigit() else 1)
    steps, notes = _steps(built, devices)
    key = "schedule.table sequence_length" if built.schedule.table else "data.sequence_length"
    require_context(net, max(shape.sequence_length for shape in steps), key)
    precision = str(trainer.precision or "32-true").removesuffix("-mixed")
    if precision not in _AUTOCAST:
        notes.append(f"precision {precision}: memory is planned as fp32, times as 16-bit products")
    try:
        memory = plan_memory(
            net, built.optimizer, _largest(steps), autocast=_AUTOCAST.get(precision)
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"model: cannot plan this network and optimizer: {error}") from error
    return Plan(built.name, net, devices, steps, memory, notes)


def _steps(built: Built, devices: int) -> tuple[dict[Shape, int], list[str]]:
    """The number of steps of each shape, and notes on them."""
    data, schedule, most = built.config.data, built.schedule, built.config.trainer.max_steps
    if schedule.table:
        size, notes = schedule.micro_batch_tokens, []
        if size == "auto":
            size, notes = _AUTO_TOKENS, [f"micro_batch_tokens: auto is planned as {_AUTO_TOKENS:,}"]
        planned = plan_steps(schedule.table, micro_batch_tokens=size, world_size=devices)
        shapes = [Shape(s.sequence_length, s.batch_size, s.micro_batches) for s in planned]
        return dict(Counter(shapes[: most if most > 0 else None])), notes
    shape = Shape(data.sequence_length, data.micro_batch_size, data.micro_batches)
    ends = [most] if most > 0 else []
    if data.max_tokens is not None:
        ends.append(ceil(data.max_tokens / (prod(shape) * devices)))
    if not ends:
        raise InputError(f"trainer.max_steps: {most}, and no schedule.table ends the run; set one")
    names = [entry.class_path.split(".")[-1] for entry in built.config.trainer.callbacks or []]
    notes = [f"callbacks may change the shapes: {', '.join(names)}"] if names else []
    return {shape: min(ends)}, notes


def plan_memory(
    net: Network,
    optimizer: Callable[[Any], Optimizer],
    shape: Shape,
    *,
    autocast: torch.dtype | None = None,
) -> dict[str, int]:
    """Bytes that a training step takes; exact but for activations, which torch.compile makes fewer.

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
        sizes = [storage.nbytes() for storage in saved.values()]
        loss.backward()
        built = optimizer(parameter_groups(net))
        built.step()
    gradients = sum(parameter.nbytes for parameter in net.parameters())
    state = [value for values in built.state.values() for value in values.values()]
    return {
        "weights": gradients + sum(buffer.nbytes for buffer in net.buffers()),
        "gradients": gradients,
        "optimizer state": sum(value.nbytes for value in state if isinstance(value, Tensor)),
        "activations": sum(sizes),  # saved for the backward pass
        "largest gradient": max(sizes),  # of an activation, mostly the logits
    }
