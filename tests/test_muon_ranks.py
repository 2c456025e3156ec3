"""Muon shared out over ranks, held against one process; the ranks are processes on this machine."""

import copy
import functools
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from hlbgpt.optim import MuonAdamW, parameter_groups
from hlbgpt.optim.muon import orthogonalize
from hlbgpt.optim.ranks import assign, orthogonalize_replicated

LR = 0.02
SHAPES = {"a": (8, 8), "b": (16, 4), "c": (9, 9), "d": (4, 16), "e": (3, 8), "f": (16, 2)}


class Net(nn.Module):
    """A few matrices for Muon and, for AdamW, a vector and a scalar; all of them odd."""

    def __init__(self, names: str = "abcdef") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ParameterDict({name: torch.randn(SHAPES[name]) for name in names})
        self.vector = nn.Parameter(torch.randn(5))
        self.scalar = nn.Parameter(torch.randn(1))


def make_optimizer(net: nn.Module) -> MuonAdamW:
    groups = {"block_matrices": {"lr": LR, "weight_decay": 0.1}}
    return MuonAdamW(parameter_groups(net), groups, lr=0.01)


def gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor | None:
    """A gradient that every process draws alike; now and then a matrix has none."""
    if step == 1 and name in ("blocks.a", "blocks.f"):
        return None
    return torch.randn(shape, generator=torch.Generator().manual_seed(step + sum(name.encode())))


def train(net: nn.Module, optimizer: MuonAdamW, steps: range) -> None:
    for step in steps:
        for name, param in net.named_parameters():
            grad = gradient(name, tuple(param.shape), step)
            if grad is not None and isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            param.grad = grad
        optimizer.step()


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: whole(param.detach()).clone() for name, param in net.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-4, msg=name)


# --- what the ranks do ------------------------------------------------------------------------


def replicated(names: str) -> Any:
    """Weights and momenta after three steps of the same gradients everywhere."""
    net = Net(names)
    optimizer = make_optimizer(net)
    train(net, optimizer, range(3))
    momenta = {
        name: optimizer.state[param]["momentum_buffer"] for name, param in net.blocks.items()
    }
    return weights(net), momenta


def orthogonalized() -> list[tuple[int, ...]]:
    """The shapes that this rank orthogonalizes."""
    seen = []

    def function(matrices: list[Tensor]) -> list[Tensor]:
        seen.extend(tuple(matrix.shape) for matrix in matrices)
        return orthogonalize(matrices)

    orthogonalize_replicated(function, [torch.randn(shape) for shape in SHAPES.values()])
    return seen


FULL = StateDictOptions(full_state_dict=True)


def sharded(counts: dict[str, int]) -> dict[str, Any]:
    """FSDP2's net: trained, saved whole, loaded into another, and both trained further."""
    nets = []
    for _ in range(2):
        net = Net()
        fully_shard(net)
        nets.append((net, make_optimizer(net)))
    (net, optimizer), (other, fresh) = nets
    train(net, optimizer, range(2))
    counts.clear()
    train(net, optimizer, range(2, 3))
    found: dict[str, Any] = {"counts": dict(counts), "weights": weights(net)}
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=FULL))
    found |= {"empty": any(len(p.to_local()) == 0 for p in net.parameters()), "saved": saved}
    other.load_state_dict(net.state_dict())
    set_optimizer_state_dict(other, fresh, copy.deepcopy(saved), options=FULL)
    train(net, optimizer, range(3, 5))
    train(other, fresh, range(3, 5))
    return found | {"further": weights(net), "loaded further": weights(other)}


def refusals() -> list[str]:
    """What the optimizer says to matrices sharded by columns, or of which one is sharded."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    messages = []
    for placement, names in ((Shard(1), "ab"), (Shard(0), "a")):
        net = Net("ab")
        for name in names:
            net.blocks[name] = nn.Parameter(distribute_tensor(net.blocks[name], mesh, [placement]))
        with pytest.raises(ValueError, match="muon is for") as error:
            make_optimizer(net)
        messages.append(str(error.value))
    return messages


def count_collectives() -> dict[str, int]:
    """From now on, how often each collective is called."""
    counts: dict[str, int] = {}

    def counted(name: str) -> Any:
        function = getattr(dist, name)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    for name in ("all_gather", "all_to_all_single", "all_reduce", "broadcast", "barrier"):
        setattr(dist, name, counted(name))
    return counts


def work(rank: int, world_size: int, folder: str) -> None:
    """What one rank does and finds."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    counts = count_collectives()
    found = {"replicated": replicated("abcdef"), "counts": dict(counts)}
    found |= {"one matrix": replicated("b"), "orthogonalized": orthogonalized()}
    found |= {"sharded": sharded(counts), "refusals": refusals()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run(world_size: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank found; the ranks are ended if they take too long."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    processes = torch.multiprocessing.spawn(
        work, (world_size, str(folder)), nprocs=world_size, join=False
    )
    deadline = time.monotonic() + 240
    while not processes.join(timeout=5):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail("the ranks wait for each other")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


@pytest.fixture(
    scope="module",
    params=[2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, len(SHAPES) + 1))],
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: Any) -> list[dict[str, Any]]:
    """What each of 2, 3 or more ranks than matrices found."""
    return run(request.param, tmp_path_factory.mktemp("ranks"))


# --- tests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["abcdef", "b"])
def test_replicated_weights_are_equal_on_all_ranks_and_as_of_one(names: str, ranks: Any) -> None:
    key = "replicated" if len(names) > 1 else "one matrix"
    ours, momenta = ranks[0][key]
    for rank in ranks[1:]:
        torch.testing.assert_close(rank[key], (ours, momenta), rtol=0, atol=0)
    one, one_momenta = replicated(names)
    assert_close(ours, one)
    torch.testing.assert_close(momenta, one_momenta, rtol=0, atol=0)
    assert (ours["blocks.b"] - Net(names).blocks["b"]).abs().max() > LR / 10  # it has trained


def test_each_matrix_is_orthogonalized_once_with_one_collective_a_step(ranks: Any) -> None:
    assert sorted(shape for rank in ranks for shape in rank["orthogonalized"]) == sorted(
        SHAPES.values()
    )
    assert all(rank["counts"] == {"all_gather": 3} for rank in ranks)


def test_sharded_weights_are_as_of_one_process_with_two_collectives_a_step(ranks: Any) -> None:
    net = Net()
    train(net, make_optimizer(net), range(3))
    for rank in ranks:
        assert_close(rank["sharded"]["weights"], weights(net))
        assert rank["sharded"]["counts"] == {"all_to_all_single": 2}
    assert any(rank["sharded"]["empty"] for rank in ranks)  # as of the scalar


def test_state_saved_from_shards_goes_on_sharded_and_on_one_device(ranks: Any) -> None:
    found = ranks[0]["sharded"]
    torch.testing.assert_close(found["further"], found["loaded further"], rtol=0, atol=0)
    net = Net()
    optimizer = make_optimizer(net)
    train(net, optimizer, range(3))
    ours = get_optimizer_state_dict(net, optimizer)
    torch.testing.assert_close(found["saved"]["state"], ours["state"], rtol=0, atol=1e-6)
    assert found["saved"]["param_groups"] == ours["param_groups"]
    fresh = make_optimizer(net)
    with torch.no_grad():
        for name, param in net.named_parameters():
            param.copy_(found["weights"][name])
    set_optimizer_state_dict(net, fresh, copy.deepcopy(found["saved"]))
    train(net, fresh, range(3, 5))
    assert_close(weights(net), found["further"])


def test_matrices_sharded_in_other_ways_are_refused(ranks: Any) -> None:
    for rank in ranks:
        by_columns, one_of_two = rank["refusals"]
        assert by_columns == "muon is for whole matrices or Shard(0), not Shard(dim=1); use adamw"
        assert "groups.block_matrices: muon is for matrices that are sharded alike" in one_of_two


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_work_is_balanced(world_size: int) -> None:
    width = 64
    block = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    shapes = [*block * 7, (16, width), (16, width)]
    owned = assign(shapes, world_size)
    assert sorted(i for indices in owned for i in indices) == list(range(len(shapes)))
    loads = [sum(min(shapes[i]) * shapes[i][0] * shapes[i][1] for i in own) for own in owned]
    assert max(loads) - min(loads) <= width**3
