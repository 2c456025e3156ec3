"""The largest micro-batch that fits into a GPU's memory, measured before training."""

import math
from collections.abc import Callable

import torch

from hlbgpt.models import Network
from hlbgpt.optim.ranks import local_shards
from hlbgpt.utils.errors import InputError

_USABLE = 0.85  # part of the free memory; the rest is for fragmentation and libraries
_CPU_TOKENS = 8192  # on a CPU larger micro-batches are no faster


def fitting_tokens(net: Network, sequence_length: int, most: int, device: torch.device) -> int:
    """Tokens of the largest micro-batch that fits on `device` beside what training keeps there.

    Runs micro-batches of one and two windows forward and backward, without torch.compile, which
    needs no more memory, and extrapolates linearly.

    Args:
        net: On `device`, without gradients.
        sequence_length: Length of the longest windows.
        most: Tokens that are never exceeded.
        device: A GPU; on any other device the result is `most`, up to 8192.

    Raises:
        InputError: not even one window fits.
    """
    if device.type != "cuda":
        return min(most, max(_CPU_TOKENS, sequence_length))
    # Gradients, and two numbers per parameter in the optimizer.
    kept = 3 * sum(p.nbytes for p in local_shards([p for p in net.parameters() if p.requires_grad]))

    def peak(windows: int) -> float:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            # Not compiled, which would be done for each of these shapes.
            with torch.compiler.set_stance("force_eager"):
                forward_and_backward(net, (windows, sequence_length), device)
        except torch.OutOfMemoryError:
            net.zero_grad(set_to_none=True)
            return math.inf
        return torch.cuda.max_memory_allocated(device) - before

    peak(1)  # the first products take memory for cuBLAS, which keeps it
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total - reserved
    room = min(free, allowed) + reserved - torch.cuda.memory_allocated(device)
    windows = windows_that_fit(peak, room * _USABLE - kept, most // sequence_length)
    torch.cuda.empty_cache()
    return windows * sequence_length


def windows_that_fit(peak: Callable[[int], float], room: float, most: int) -> int:
    """The largest number of windows, up to `most`, whose memory stays within `room` bytes.

    Args:
        peak: Bytes that a micro-batch of one or two windows takes; infinity if it runs out of them.
        room: Bytes.
        most: At least 1.

    Raises:
        InputError: not even one window fits.
    """
    one = peak(1)
    if one > room:
        takes = f"{one / 1e9:.1f} GB" if math.isfinite(one) else "more"
        raise InputError(
            f"schedule.micro_batch_tokens: one window takes {takes}, and {max(room, 0) / 1e9:.1f} "
            "GB are free; use shorter sequences or a smaller network"
        )
    if most <= 1:
        return 1
    more = max(1, peak(2) - one)
    return max(1, min(most, 1 + int((room - one) // more)))


def forward_and_backward(net: Network, shape: tuple[int, int], device: torch.device) -> None:
    """Run `net` on dummy tokens (B, T), and drop the gradients."""
    rows, length = shape
    # Sliced as in training, because torch.compile specializes on strides.
    batch = torch.zeros(rows, length + 1, dtype=torch.int64, device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        net(batch[:, :-1], batch[:, 1:]).backward()
    net.zero_grad(set_to_none=True)
