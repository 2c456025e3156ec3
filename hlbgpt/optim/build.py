"""The optimizer and its schedule, built from what a config gives."""

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion
from torch import nn
from torch.optim import Optimizer

from hlbgpt.optim.parameter_groups import parameter_groups
from hlbgpt.utils.errors import InputError


def build_optimizer(
    net: nn.Module, make_optimizer: OptimizerCallable, make_scheduler: LRSchedulerCallable | None
) -> tuple[Optimizer, LRSchedulerTypeUnion | None]:
    """The optimizer of `net` and its learning-rate schedule, if there is one.

    Each parameter group has its `initial_lr`, which a token schedule multiplies. Raises InputError
    for settings that the classes refuse.
    """
    key = "model.optimizer"
    try:
        optimizer = make_optimizer(parameter_groups(net))
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        key = "model.lr_scheduler"
        return optimizer, make_scheduler(optimizer) if make_scheduler else None
    except (ValueError, TypeError, ArithmeticError) as error:
        raise InputError(f"{key}: {error}; change its init_args") from error
