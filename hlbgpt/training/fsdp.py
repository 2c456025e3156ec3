"""FSDP2: every rank keeps a part of each weight, of its gradient and of its optimizer state."""

import contextlib
import copy
import itertools
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import (
    ModelParallelStrategy,
    ParallelStrategy,
    StrategyRegistry,
)
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from hlbgpt.models import Network
from hlbgpt.utils.errors import InputError


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy, with the weights split over all devices.

    Each device trains on data of its own, as with DDP. Checkpoints are those of one device: a
    single file, from which any number of devices, with any strategy, goes on.

    Args:
        process_group_backend: Backend of torch.distributed; that of the devices by default.
        timeout: Time after which a rank that waits for another one gives up.
    """

    def __init__(
        self,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        # Known only here, and not public: the default is the number of nodes.
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def data_mesh(self) -> DeviceMesh:
        """All ranks, in one dimension."""
        return self.device_mesh["data_parallel"]

    # --- checkpoints: all ranks gather the state, and rank 0 writes it --------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._gather(ParallelStrategy.lightning_module_state_dict(self))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As `optimizer.state_dict()` of one device.

        Lightning numbers the parameters anew, by their place in the network. Where they are sorted
        into groups, another strategy would give each parameter the state of another.
        """
        state = ParallelStrategy.optimizer_state(self, optimizer)
        return {**state, "state": {i: self._gather(of) for i, of in state["state"].items()}}

    def _gather(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Whole tensors, on the CPU of rank 0; others keep their shapes only."""
        device = "cpu" if self.is_global_zero else "meta"
        return {
            name: value.full_tensor().to(device) if isinstance(value, DTensor) else value
            for name, value in state.items()
        }

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Read a file on each rank, with all the checks of a single device."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        weights = {
            name: _shard_like(own.get(name), value)
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(weights, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [i for group in state["param_groups"] for i in group["params"]]
            shards = {
                i: {name: _shard_like(param, value) for name, value in state["state"][i].items()}
                for i, param in zip(numbers, params, strict=True)
                if i in state["state"]
            }
            optimizer.load_state_dict({**state, "state": shards})


# So that `--trainer.strategy fsdp2` names it.
StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2: weights split over devices")


def _shard_like(param: Tensor | None, value: Any) -> Any:
    """This rank's part of a whole `value`, split as `param`; others as they are."""
    if not isinstance(param, DTensor) or not isinstance(value, Tensor):
        return value
    if value.shape != param.shape:  # such as the number of steps
        return value
    # Every rank has the whole, so that nothing need be sent.
    return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)


def shard(net: Network, mesh: DeviceMesh) -> Network:
    """Split the weights of `net` over the ranks of `mesh`, in place.

    A block's weights are gathered when it runs, and those outside of blocks for a whole step.
    Names in checkpoints stay as they are.

    Returns:
        A copy without weights, for `gathered`.

    Raises:
        InputError: A parameter has no dimensions, which FSDP2 cannot split.
    """
    for name, parameter in net.named_parameters():
        if parameter.ndim == 0:
            raise InputError(
                f"model.net: {name} has no dimensions, and FSDP2 splits the first one; give it "
                "the shape (1,), or set trainer.strategy to ddp"
            )
    tensors = itertools.chain(net.parameters(), net.buffers())
    empty = copy.deepcopy(net, {id(tensor): tensor.to("meta") for tensor in tensors})
    for block in getattr(net, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return empty


@contextlib.contextmanager
def gathered(net: Network, empty: Network) -> Iterator[Network]:
    """A network with all weights of `net` on each rank, which some ranks may run alone.

    All ranks must enter. (Ranks that run a different number of blocks of `net` itself would gather
    different weights in the next backward pass.)

    Args:
        net: The network that is split.
        empty: The copy that `shard` has made.
    """
    parts = [module for module in net.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    empty.train(net.training)
    for target, source in zip(empty.modules(), net.modules(), strict=True):
        for name, tensor in itertools.chain(
            source.named_parameters(recurse=False), source.named_buffers(recurse=False)
        ):
            setattr(target, name, tensor)
    try:
        yield empty
    finally:
        empty.to("meta")
        for part in parts:
            part.reshard()
