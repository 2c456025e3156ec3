"""torch.compile: in place, with the same result every time, and before the clock starts."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.optim import Optimizer

from hlbgpt.models import Network, token_scores
from hlbgpt.training.memory import forward_and_backward
from hlbgpt.utils.clock import Stopwatch, synchronize

_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_OTHER_GRAPHS = 8  # beside one for each training shape; evaluation has its own


def compile_in_place(net: Network, device: torch.device, cache_dir: Path) -> None:
    """Let `net` run compiled on `device`; names in checkpoints stay as they are. Idempotent.

    Each shape gets a graph of its own. What is compiled is kept in `cache_dir`, unless the
    environment variable TORCHINDUCTOR_CACHE_DIR names another folder than torch's default.
    """
    # torch sets it to its default, a temporary folder, as soon as it is imported.
    if os.environ.get(_CACHE) in (None, default_cache_dir()):
        os.environ[_CACHE] = str(cache_dir / "compiled")
    if device.type == "cpu":
        # Inductor adds up an embedding's gradients in the order in which threads finish; in this
        # mode a run is the same every time.
        torch.use_deterministic_algorithms(True)
        # Would cost time, and nothing here reads memory that it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # By default, torch keeps no graph that has an autograd function of one's own.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    if net._compiled_call_impl is None:
        # With the second shape, the default would go over to slower kernels for any shape.
        net.compile(dynamic=False)


def warm_up(
    net: Network,
    *,
    train_shapes: Sequence[tuple[int, int]],
    eval_shape: tuple[int, int],
    device: torch.device,
) -> float:
    """Compile for each shape (B, T) of a batch, on dummy tokens; returns the seconds it took.

    No optimizer step is made, gradients are dropped and the random state is restored, so training
    starts as if nothing had run.
    """
    config = torch._dynamo.config
    # Twice, because FSDP2 lets each kind of block be compiled by itself.
    config.recompile_limit = max(config.recompile_limit, 2 * len(train_shapes) + _OTHER_GRAPHS)
    watch = Stopwatch()
    watch.start()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        net.train()
        for shape in train_shapes:
            forward_and_backward(net, shape, device)
        net.eval()
        with torch.no_grad():
            rows, length = eval_shape
            token_scores(net, torch.zeros(rows, length + 1, dtype=torch.int64, device=device))
        net.train()
    synchronize(device)
    watch.stop()
    return watch.seconds


@torch.no_grad()
def warm_up_optimizer(optimizer: Optimizer) -> float:
    """Make a step with gradients of zero and undo it; returns the seconds it took.

    The first step of an optimizer allocates its state and loads its kernels, which is no training.
    Weights, state, settings and random numbers are restored to the last bit.
    """
    watch = Stopwatch()
    watch.start()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    weights = [param.clone() for param in params]
    state = {param: copy.deepcopy(values) for param, values in optimizer.state.items()}
    settings = [
        {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    for param in params:
        param.grad = torch.zeros_like(param)
    device = params[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        optimizer.step(lambda: params[0].new_zeros(()))
    optimizer.zero_grad()
    for param, weight in zip(params, weights, strict=True):
        param.copy_(weight)
    optimizer.state.clear()
    optimizer.state.update(state)
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)
    synchronize(device)
    watch.stop()
    return watch.seconds
