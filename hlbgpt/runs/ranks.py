"""The processes of a run, before they can talk through torch.distributed: which is the first, and
what it decides for all of them, such as the run's folder.

torchrun and SLURM start all processes alike; these agree through the store that torch.distributed
will use later. Those that Lightning launches inherit the decisions in an environment variable.
"""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from typing import TypeVar

import lightning as L
import torch.distributed as dist
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from hlbgpt.utils.errors import InputError, one_line

T = TypeVar("T")  # anything that JSON can hold

_DECISIONS = "HLBGPT_DECISIONS"  # environment variable, for the processes that Lightning launches
_WAIT = timedelta(minutes=10)  # for processes that start later
_stores: list[dist.Store] = []  # at most one; the first process serves it to the others
_number = count()  # of the next decision, the same in all processes


def launcher() -> ClusterEnvironment | None:
    """What started the processes of this run, found as Lightning does; None where it launches them.

    Raises InputError for variables of SLURM that contradict each other.
    """
    kinds = TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment
    try:
        return next((kind() for kind in kinds if kind.detect()), None)
    except RuntimeError as error:
        raise InputError(f"srun: {one_line(error)}") from error


def is_first_process() -> bool:
    """Whether this process has rank 0, whoever launched it."""
    if rank := os.environ.get("RANK"):
        return int(rank) == 0
    if environment := launcher():
        return environment.global_rank() == 0
    environment = LightningEnvironment()
    return environment.local_rank() == environment.node_rank() == 0


def restarts() -> int:
    """How often torchrun or SLURM has started this run again, after a failure or as asked."""
    variable = "SLURM_RESTART_COUNT"
    if TorchElasticEnvironment.detect():
        variable = "TORCHELASTIC_RESTART_COUNT"
    return int(os.environ.get(variable) or 0)  # some schedulers leave it empty


def decide(key: str, make: Callable[[], T], *, required: bool = True) -> T:
    """What `make` returns, or the InputError that it raises, in the first process.

    All processes of a run must ask, in the same order.

    Args:
        key: The setting that is decided.
        make: Called in the first process only.
        required: Whether to raise InputError where the processes have no way to agree; else each
            of them calls `make`.
    """
    environment = launcher()
    if environment and environment.world_size() > 1:
        return _decide_in_store(environment, key, make)
    decisions = json.loads(os.environ.get(_DECISIONS, "{}"))
    if is_first_process():
        decisions[key] = make()
        os.environ[_DECISIONS] = json.dumps(decisions)
    elif key not in decisions:  # on another node, where a user started it by hand
        if not required:
            return make()
        raise InputError(
            f"{key}: this process is not the first one, and they cannot agree; start them with "
            f"torchrun or srun, or set {key} for all of them"
        )
    return decisions[key]


def forget_decisions() -> None:
    """Leave nothing of an earlier run in this process."""
    if is_first_process():
        os.environ.pop(_DECISIONS, None)


def _decide_in_store(environment: ClusterEnvironment, key: str, make: Callable[[], T]) -> T:
    # torchrun may keep its store when it starts the processes again.
    name = f"{restarts()}/{next(_number)}/{key}"
    store = _store(environment)
    if environment.global_rank() == 0:
        try:
            value = make()
        except InputError as error:
            store.set(name, json.dumps({"error": str(error)}))
            raise
        store.set(name, json.dumps({"value": value}))
        return value
    try:
        found = json.loads(store.get(name))
    except dist.DistError as error:
        raise InputError(f"{key}: the first process has ended, or says nothing") from error
    if "error" in found:
        raise InputError(found["error"])
    return found["value"]


def _store(environment: ClusterEnvironment) -> dist.Store:
    """The store at the address that torch.distributed will use; waits for all processes."""
    if _stores:
        return _stores[0]
    address, port = environment.main_address, environment.main_port
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    rank, number = environment.global_rank(), environment.world_size()
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", rank, number, timeout=_WAIT)))
    except dist.DistError as error:
        raise InputError(
            f"process {rank} of {number}: not all processes met at {address}:{port}; start them "
            f"together, with torchrun or srun: {one_line(error)}"
        ) from error
    _stores.append(dist.PrefixStore("hlbgpt", store))
    return _stores[0]


def require_all_processes(trainer: L.Trainer) -> None:
    """Raise InputError where a launcher has started more processes than `trainer` uses, or less.

    Each of them would train alone, or wait for others for ever.
    """
    environment, used = launcher(), trainer.num_devices * trainer.num_nodes
    if environment and (started := environment.world_size()) != used:
        name = "torchrun" if isinstance(environment, TorchElasticEnvironment) else "the scheduler"
        raise InputError(
            f"trainer.devices: {trainer.num_devices} on {trainer.num_nodes} node(s) need {used} "
            f"process(es), but {name} started {started}; set --trainer.devices to the number on "
            "each node and --trainer.num_nodes to that of nodes"
        )
