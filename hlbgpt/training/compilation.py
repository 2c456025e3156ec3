"""torch.compile: in place, with the same result every time, and before the clock starts."""

from collections.abc import Iterable

import torch

from hlbgpt.models import Network, token_scores
from hlbgpt.training.memory import forward_and_backward
from hlbgpt.utils.clock import Stopwatch, synchronize


def compile_in_place(net: Network, device: torch.device) -> None:
    """Let `net` run compiled on `device`; names in checkpoints stay as they are. Idempotent."""
    if device.type == "cpu":
        # Inductor adds up an embedding's gradients in the order in which threads finish; in this
        # mode a run is the same every time.
        torch.use_deterministic_algorithms(True)
        # Would cost time, and nothing here reads memory that it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if net._compiled_call_impl is None:
        net.compile()


def warm_up(
    net: Network,
    *,
    train_shapes: Iterable[tuple[int, int]],
    eval_shape: tuple[int, int],
    device: torch.device,
) -> float:
    """Compile for each shape (B, T) of a batch, on dummy tokens; returns the seconds it took.

    No optimizer step is made, gradients are dropped and the random state is restored, so training
    starts as if nothing had run.
    """
    watch = Stopwatch()
    watch.start()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        net.train()
        for shape in train_shapes:
            forward_and_backward(net, net, shape, device)
        net.eval()
        with torch.no_grad():
            rows, length = eval_shape
            token_scores(net, torch.zeros(rows, length + 1, dtype=torch.int64, device=device))
        net.train()
    synchronize(device)
    watch.stop()
    return watch.seconds
