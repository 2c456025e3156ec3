"""How fast a device is at the sizes of a network: copies, products of matrices, attention.

Shapes: B windows, T tokens of a window, D width, H heads.
"""

import itertools
import time
from collections.abc import Callable
from importlib.metadata import distributions
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hlbgpt.cli.main import Built
from hlbgpt.models import AdaptiveSoftmax
from hlbgpt.optim.schedules import plan_steps, step_shapes
from hlbgpt.utils.clock import synchronize
from hlbgpt.utils.git import git_revision
from hlbgpt.utils.hardware import device_name, driver_version, gpu_of

_SIZES = {"cuda": (1 << 28, 8192), "cpu": (1 << 24, 512)}  # numbers to copy, side of a product

Row = dict[str, Any]  # of a table, by the names of its columns


class Timeline:
    """Marks in the work of a device, which do not make the host wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Set a mark behind all work that the device has been given."""
        if self.device.type == "cuda":
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Milliseconds between consecutive marks; waits for the device."""
        synchronize(self.device)
        pairs = itertools.pairwise(self._marks)
        if self.device.type == "cuda":
            return [start.elapsed_time(end) for start, end in pairs]
        return [1e3 * (end - start) for start, end in pairs]


def mean_ms(work: Callable[[], Any], device: torch.device, repeat: int) -> float:
    """Mean milliseconds of `repeat` calls of `work`, after three calls that do not count."""
    for _ in range(3):
        work()
    timeline = Timeline(device)
    timeline.mark()
    for _ in range(repeat):
        work()
    timeline.mark()
    return timeline.milliseconds()[0] / repeat


def hardware_tables(built: Built, device: torch.device, repeat: int) -> dict[str, list[Row]]:
    """What the device is, and means of `repeat` measurements of it, as tables by their captions."""
    shapes, side = planned_shapes(built), _SIZES[device.type][1]
    sizes = [*product_sizes(built.net, max(b * t for b, t in shapes)), (side, side, side)]
    if not built.config.model.net.init_args.get("num_heads"):
        shapes = []  # HLB041 has an attention of its own
    return {
        f"Bandwidth of a copy, mean of n = {repeat}": [device_row(device, repeat)],
        f"Linear layers in bf16, TFLOP/s forward and for the gradients of input and weight, means "
        f"of n = {repeat}; the last row is for comparison": [
            {"tokens x outputs x inputs": size, **product_rates(size, device, repeat)}
            for size in sizes
        ],
        f"Attention of one block in bf16, forward and backward, mean of n = {repeat}": [
            {"windows x tokens": shape, "ms": attention_ms(built, shape, device, repeat)}
            for shape in shapes
        ],
    }


def device_row(device: torch.device, repeat: int) -> Row:
    """The device, its software, peak and bandwidth."""
    names, gpu, cuda = ("torch", "triton", "lightning"), gpu_of(device), device.type == "cuda"
    source = torch.ones(_SIZES[device.type][0], device=device)
    target = torch.empty_like(source)
    milliseconds = mean_ms(lambda: target.copy_(source), device, repeat)
    return {
        "device": device_name(device),
        "driver": driver_version() if cuda else None,
        **{found.name: found.version for found in distributions() if found.name in names},
        "git revision": git_revision(),
        "memory GB": torch.cuda.mem_get_info(device)[1] / 1e9 if cuda else None,
        "peak TFLOP/s in bf16": gpu.flops / 1e12 if gpu else None,
        "copy TB/s": 2 * source.nbytes / milliseconds / 1e9,
    }


def planned_shapes(built: Built) -> list[tuple[int, int]]:
    """Shapes (B, T) of micro-batches; whole steps where `micro_batch_tokens` is `auto`."""
    schedule, data = built.schedule, built.config.data
    if not schedule.table:
        return [(data.micro_batch_size, data.sequence_length)]
    most = max(row.step_tokens or 0 for row in schedule.table)
    tokens = most if schedule.micro_batch_tokens == "auto" else schedule.micro_batch_tokens
    return step_shapes(plan_steps(schedule.table, micro_batch_tokens=tokens))


def product_sizes(net: nn.Module, tokens: int) -> list[tuple[int, int, int]]:
    """(tokens, outputs, inputs) of the linear layers in `net`, for so many tokens."""
    sizes = {(tokens, m.out_features, m.in_features) for m in net.modules() if type(m) is nn.Linear}
    for head in net.modules():
        if isinstance(head, AdaptiveSoftmax):
            parts = zip((1.0, *head.expected_capacity()), head.sizes, strict=True)
            width = head.weight.shape[1]
            sizes |= {(max(1, int(part * tokens)), size, width) for part, size in parts}
    return sorted(sizes)


def product_rates(size: tuple[int, int, int], device: torch.device, repeat: int) -> Row:
    """TFLOP/s of a linear layer's three products, and the largest one's share of the peak."""
    tokens, outputs, inputs = size
    x, w, y = (
        torch.randn(shape, device=device, dtype=torch.bfloat16)
        for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    products = {"forward": lambda: x @ w.T, "input": lambda: y @ w, "weight": lambda: y.T @ x}
    rates = {
        name: 2 * tokens * outputs * inputs / mean_ms(work, device, repeat) / 1e9
        for name, work in products.items()
    }
    gpu = gpu_of(device)
    return {**rates, "forward / peak": rates["forward"] * 1e12 / gpu.flops if gpu else None}


def attention_ms(built: Built, shape: tuple[int, int], device: torch.device, repeat: int) -> float:
    """Milliseconds of causal attention, forward and backward, by the kernel that torch chooses."""
    settings, (rows, length) = built.config.model.net.init_args, shape
    size = rows, settings.num_heads, length, settings.width // settings.num_heads  # (B, H, T, D/H)
    q, k, v, gradient = torch.randn(4, *size, device=device, dtype=torch.bfloat16)
    for tensor in (q, k, v):
        tensor.requires_grad_()

    def work() -> None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(y, (q, k, v), gradient)

    return mean_ms(work, device, repeat)
