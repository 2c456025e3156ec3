"""FSDP2: every rank keeps a part of each weight, of its gradient and of its optimizer state."""

import contextlib
import copy
import itertools
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.optim import Optimizer

from hlbgpt.models import Network
from hlbgpt.optim.ranks import is_split
from hlbgpt.utils.errors import InputError

if TYPE_CHECKING:  # where they are used, since some builds of torch lack them
    from torch.distributed.device_mesh import DeviceMesh


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
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        # Not public, but known here only; by default it is the number of nodes.
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def data_mesh(self) -> "DeviceMesh":
        """All ranks, in one dimension."""
        return self.device_mesh["data_parallel"]

    # --- checkpoints: all ranks gather the state, and rank 0 writes it --------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._gather(ParallelStrategy.lightning_module_state_dict(self))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As `optimizer.state_dict()` of one device.

        Lightning would number the parameters by their place in the network. Since groups sort them
        otherwise, another strategy would give a parameter the state of another one.
        """
        state: dict[str, Any] = ParallelStrategy.optimizer_state(self, optimizer)
        return {**state, "state": {i: self._gather(of) for i, of in state["state"].items()}}

    def _gather(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Whole tensors, on the CPU of rank 0; the other ranks keep their shapes only."""
        device = "cpu" if self.is_global_zero else "meta"
        return {
            name: whole(value).to(device) if is_split(value) else value
            for name, value in state.items()
        }

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Read the file on each rank, with the checks of a single device."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        weights = {
            name: _split_like(own.get(name), value)
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(weights, strict=strict)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [i for group in state["param_groups"] for i in group["params"]]
            parts = {
                i: {name: _split_like(param, value) for name, value in state["state"][i].items()}
                for i, param in zip(numbers, params, strict=True)
                if i in state["state"]
            }
            optimizer.load_state_dict({**state, "state": parts})


# So that `--trainer.strategy fsdp2` names it.
StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2: weights split over devices")


def require_fitting_fsdp2(trainer: L.Trainer) -> None:
    """Raise InputError for settings that cannot be used with FSDP2."""
    if not isinstance(trainer.strategy, FSDP2Strategy):
        return
    if trainer.precision == "16-mixed":  # as Lightning, which checks its own classes only
        raise InputError(
            "trainer.precision: 16-mixed, whose gradient scaler would look at each rank's part of "
            "the gradients only with trainer.strategy fsdp2; use bf16-mixed"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            raise InputError(
                f"trainer.callbacks: {type(callback).__name__}: it averages whole weights, and "
                "trainer.strategy fsdp2 splits them; use ddp"
            )


# --- tensors --------------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`. If it is split over ranks, it is gathered, and all of them must ask."""
    return tensor.full_tensor() if is_split(tensor) else tensor  # type: ignore[attr-defined]


def _split_like(param: Any, value: Any) -> Any:
    """This rank's part of a whole `value` that is split as `param`; others as they are."""
    from torch.distributed.tensor import distribute_tensor

    if not is_split(param) or not isinstance(value, Tensor) or value.shape != param.shape:
        return value
    # Every rank has the whole, so that nothing need be sent.
    return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)


# --- the network ----------------------------------------------------------------------------------


def split(net: Network, mesh: "DeviceMesh") -> Network:
    """Split the weights of `net` over the ranks of `mesh`, in place.

    A block's weights are gathered when it runs, and those outside of blocks for a whole step.
    Names in checkpoints stay as they are.

    Returns:
        A copy without weights, for `gathered`.

    Raises:
        InputError: A parameter has no dimensions, or belongs to a block and to another part.
    """
    from torch.distributed.fsdp import fully_shard

    _require_splittable(net)
    memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta")) for p in net.parameters()}
    empty = copy.deepcopy(net, memo | {id(b): b.to("meta") for b in net.buffers()})
    for block in dict.fromkeys(getattr(net, "blocks", ())):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return empty


def _require_splittable(net: Network) -> None:
    owners: dict[Tensor, tuple[str, str]] = {}  # of each parameter: block, or "", and name
    for name, parameter in net.named_parameters(remove_duplicate=False):
        if parameter.ndim == 0:
            raise InputError(
                f"model.net: {name} has no dimensions, and FSDP2 splits the first one; give it "
                "the shape (1,), or set trainer.strategy to ddp"
            )
        block = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""
        other, first = owners.setdefault(parameter, (block, name))
        if other != block:
            raise InputError(
                f"model.net: {first} and {name} are one parameter, and FSDP2 splits each block by "
                "itself; set trainer.strategy to ddp"
            )


@contextlib.contextmanager
def gathered(net: Network, empty: Network, *, keep_changes: bool = False) -> Iterator[Network]:
    """All weights of `net` on each rank; yields a network that some ranks may run alone.

    All ranks must enter. (Ranks that ran different numbers of blocks of `net` itself would gather
    different weights in the next backward pass.)

    Args:
        net: The network that is split.
        empty: The copy that `split` has made.
        keep_changes: Whether to keep what all ranks write into the weights of `net`.
    """
    from torch.distributed.fsdp import FSDPModule

    split_parameters = dict(net.named_parameters()) if keep_changes else {}
    parts = [module for module in net.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    without_weights = []
    for target, source in zip(empty.modules(), net.modules(), strict=True):
        target.training = source.training
        for name, tensor in itertools.chain(
            source.named_parameters(recurse=False, remove_duplicate=False),
            source.named_buffers(recurse=False, remove_duplicate=False),
        ):
            without_weights.append((target, name, getattr(target, name)))
            setattr(target, name, tensor)
    try:
        yield empty
        weights = dict(net.named_parameters())
        with torch.no_grad():
            for name, parameter in split_parameters.items():
                parameter.copy_(_split_like(parameter, weights[name]))
    finally:
        for target, name, tensor in without_weights:
            setattr(target, name, tensor)
        for part in parts:
            part.reshard()
