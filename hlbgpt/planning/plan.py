"""What a run will need, computed from its settings without training, data or a GPU."""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from hlbgpt.cli.main import Built, build
from hlbgpt.models import AdaptiveSoftmax, Network
from hlbgpt.optim.build import build_optimizer
from hlbgpt.optim.schedules import StepPlan, plan_steps
from hlbgpt.planning.counts import PeakMemory, Work, WorkCounter
from hlbgpt.training.checks import require_context
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.hardware import GPU

AUTO_TOKENS = 16384  # stands for `schedule.micro_batch_tokens: auto`
# Parts of a GPU's peak in a fast and in a slow run: large products reach the first, those of narrow
# layers and attention rather the second.
PRODUCTS = (0.65, 0.40)
# Parts of its bandwidth: a plain copy reaches the first, kernels with reductions or casts less.
BANDWIDTH = (0.85, 0.70)
# Part of the traffic saved by fusing that a slow run has nevertheless: compilers cut some chains,
# for example where reductions run over different dimensions.
NOT_FUSED = 0.1
_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}


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
    memory: dict[str, int]  # bytes, by what takes them; activations and update not at one time
    work: Work  # of all steps
    compiled: bool
    schedule: StepPlan = field(default_factory=StepPlan)  # of no steps if there is no table

    @property
    def tokens(self) -> int:
        return sum(prod(shape) * steps for shape, steps in self.steps.items())

    @property
    def peak_memory(self) -> int:
        """Bytes that a training step takes, at most."""
        *kept, activations, update = self.memory.values()
        return sum(kept) + max(activations, update)

    def seconds(self, gpu: GPU) -> dict[str, tuple[float, float]]:
        """Seconds of a fast and of a slow run: of products, of traffic, and of both in turn."""
        work = self.work
        products = work.flops / gpu.flops + work.fp32_flops / gpu.fp32_flops
        fewest = work.fused if self.compiled else work.unfused
        most = fewest + NOT_FUSED * (work.unfused - fewest)
        pairs = zip(PRODUCTS, (fewest, most), BANDWIDTH, strict=True)
        times = [(products / rate, moved / gpu.bandwidth / part) for rate, moved, part in pairs]
        (fast, fast_moves), (slow, slow_moves) = times
        return {
            "training seconds": (fast + fast_moves, slow + slow_moves),
            "products": (fast, slow),
            "traffic": (fast_moves, slow_moves),
        }


def plan_run(words: list[str]) -> Plan:
    """Plan `hlbgpt fit` with these arguments; raises InputError if that is impossible."""
    built = build(words, device="meta")
    schedule = _schedule(built)
    steps = _steps(built, schedule)
    longest = max(shape.sequence_length for shape in steps)
    require_context(built.net, longest, "data.sequence_length or schedule.table sequence_length")
    precision, _, kind = str(built.config.trainer.precision).partition("-")
    dtype = _DTYPES.get(precision)
    if dtype and kind == "true":
        built.net.to(dtype)
    autocast = None if kind == "true" else dtype
    memory, work = measure(built.net, built.optimizer, steps, autocast)
    return Plan(built.name, built.net, steps, memory, work, built.config.model.compile, schedule)


def _schedule(built: Built) -> StepPlan:
    if not built.schedule.table:
        return StepPlan()
    size = built.schedule.micro_batch_tokens
    size = AUTO_TOKENS if size == "auto" else size
    return plan_steps(built.schedule.table, micro_batch_tokens=size)


def _steps(built: Built, schedule: StepPlan) -> dict[Shape, int]:
    """The number of steps of each shape."""
    data, max_steps = built.config.data, built.config.trainer.max_steps
    if schedule.stages:
        steps: Counter[Shape] = Counter()
        for stage in schedule.stages:
            left = max_steps - stage.first_step if max_steps > 0 else stage.steps
            shape = Shape(stage.sequence_length, stage.batch_size, stage.micro_batches)
            steps[shape] += min(stage.steps, max(0, left))
        return dict(+steps)  # without shapes that come after the last step
    shape = Shape(data.sequence_length, data.micro_batch_size, data.micro_batches)
    ends = [end for end in (max_steps, ceil((data.max_tokens or 0) / prod(shape))) if end > 0]
    if not ends:
        raise InputError(f"trainer.max_steps: {max_steps}, and no schedule.table; set one of them")
    return {shape: min(ends)}


def measure(
    net: Network,
    optimizer: Callable[[Any], Optimizer],
    steps: dict[Shape, int],
    autocast: torch.dtype | None,
) -> tuple[dict[str, int], Work]:
    """Bytes that a training step takes without torch.compile, and the work of all `steps`.

    Weights, gradients and state are there all the time; activations between the forward and the
    backward pass; what the update allocates for itself, after that.

    Runs on fake tensors, which have shapes but no memory, and leaves them in `net`.
    """
    for module in net.modules():  # the default capacity depends on the values of a batch
        if isinstance(module, AdaptiveSoftmax) and module.capacity is None:
            module.capacity = module.expected_capacity()
    with FakeTensorMode(allow_non_fake_inputs=True):
        net.to_empty(device="cpu")  # the meta device has no autocast
        each = {shape: _micro_batch(net, shape, autocast) for shape in steps}
        built, _ = build_optimizer(net, optimizer, None)
        with WorkCounter() as counter:
            built.step()  # makes the state
        with PeakMemory() as update_memory:
            built.step()
    state = [value for values in built.state.values() for value in values.values()]
    memory = {
        "weights": sum(tensor.nbytes for tensor in [*net.parameters(), *net.buffers()]),
        "gradients": sum(parameter.nbytes for parameter in net.parameters()),
        "optimizer state": sum(value.nbytes for value in state if isinstance(value, Tensor)),
        "activations": max(activations for activations, _ in each.values()),
        "update": update_memory.peak,
    }
    # Reads gradients; reads and writes weights and state: 28 bytes a parameter for fused AdamW.
    moved = 3 * memory["gradients"] + 2 * memory["optimizer state"]
    update = counter.work._replace(fused=moved, unfused=moved)
    accumulation = Work(fused=3 * memory["gradients"], unfused=3 * memory["gradients"])
    parts = [(n * shape.micro_batches, each[shape][1]) for shape, n in steps.items()]
    parts += [(n * (shape.micro_batches - 1), accumulation) for shape, n in steps.items()]
    return memory, Work.total([*parts, (sum(steps.values()), update)])


def _micro_batch(net: Network, shape: Shape, autocast: torch.dtype | None) -> tuple[int, Work]:
    """Bytes that are saved for the backward pass of a micro-batch, and its work.

    With activation checkpointing these include what the largest block saves when it runs again.
    """
    net.zero_grad(set_to_none=True)
    tokens = torch.zeros(shape.micro_batch_size, shape.sequence_length + 1, dtype=torch.int64)
    calls: list[tuple[Any, ...]] = []  # block, arguments
    blocks = net.get_submodule("blocks").children() if net.activation_checkpointing else ()
    hooks = [
        block.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
        for block in blocks
    ]
    with WorkCounter() as counter:
        saved, loss = _saved(lambda: net(tokens[:, :-1], tokens[:, 1:]), autocast)
        counter.backward = True
        loss.backward()
    for hook in hooks:
        hook.remove()
    weights = {x.untyped_storage()._cdata for x in [*net.parameters(), *net.buffers()]}
    again = [
        _saved(partial(type(block).forward, block, *args, **kwargs), autocast)[0]
        for block, args, kwargs in calls
    ]
    most = max((_size(one, saved.keys() | weights) for one in again), default=0)
    return _size(saved, weights) + most, counter.work


def _saved(
    run: Callable[[], Tensor], autocast: torch.dtype | None
) -> tuple[dict[int, torch.UntypedStorage], Tensor]:
    """The storages that autograd saves while `run` runs, by number, and its result."""
    saved: dict[int, torch.UntypedStorage] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None),
    ):
        return saved, run()


def _size(storages: dict[int, torch.UntypedStorage], without: Collection[int]) -> int:
    return sum(x.nbytes() for number, x in storages.items() if number not in without)
