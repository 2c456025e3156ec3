"""Shares out the matrices of Muon over ranks, so that each is orthogonalized only once.

A rank is a process of a distributed run. All ranks make the same calls, with gradients for the same
parameters. Results travel in bf16, which is what Newton-Schulz computes in, so that nothing is
lost, and all ranks have the same results to the last bit.

Weights are whole on every rank, as with DDP, or sharded by rows, as with FSDP2.

Shapes: matrices of R rows and C columns.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Orthogonalize = Callable[[list[Tensor]], list[Tensor]]
RESULT_DTYPE = torch.bfloat16


def is_distributed() -> bool:
    """Whether this process belongs to a group of ranks, perhaps as the only one."""
    return dist.is_available() and dist.is_initialized()


def has_other_ranks() -> bool:
    """Whether this process has others to exchange numbers with."""
    return is_distributed() and dist.get_world_size() > 1


def is_split(value: Any) -> bool:
    """Whether `value` is a DTensor, of which this rank may have only a part."""
    return hasattr(value, "full_tensor")  # some builds of torch lack the class


def local_shards(tensors: list[Tensor]) -> list[Tensor]:
    """What this rank holds of each tensor, in the same memory; all of it if it is not sharded."""
    if not is_distributed():
        return tensors
    return [
        tensor.to_local() if is_split(tensor) else tensor  # type: ignore[attr-defined]
        for tensor in tensors
    ]


def shard_group(matrix: Tensor) -> dist.ProcessGroup | None:
    """The ranks over which `matrix` is sharded by rows; None if each has all of it.

    Raises ValueError if it is sharded in another way.
    """
    if not is_distributed() or not is_split(matrix):
        return None
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(matrix, DTensor)
    sharded = [i for i, place in enumerate(matrix.placements) if not place.is_replicate()]
    if not sharded:
        return None
    placement = matrix.placements[sharded[0]]
    if len(sharded) > 1 or type(placement) is not Shard or placement.dim != 0:
        raise ValueError(f"muon is for whole matrices or Shard(0), not {placement!r}; use adamw")
    return matrix.device_mesh.get_group(sharded[0])


def share_out(orthogonalize: Orthogonalize, matrices: list[Tensor]) -> Orthogonalize:
    """A function that does for the local shards of `matrices` what `orthogonalize` does for them.

    With several ranks, each matrix is computed by one of them; else it is `orthogonalize` itself.
    """
    if not has_other_ranks():
        return orthogonalize
    group = shard_group(matrices[0])
    if group is None:
        return partial(orthogonalize_replicated, orthogonalize)
    shapes = [matrix.shape for matrix in matrices]
    return partial(orthogonalize_sharded, orthogonalize, shapes=shapes, group=group)


def assign(shapes: Sequence[Sequence[int]], ranks: int) -> list[list[int]]:
    """The indices of the matrices (R, C) that each rank is to orthogonalize.

    The cost of Newton-Schulz, min(R, C) * R * C, is balanced: the most expensive matrices come
    first, and each goes to the rank that has the least to do so far.
    """
    costs = [min(rows, columns) * rows * columns for rows, columns in shapes]
    owned: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        rank = loads.index(min(loads))
        owned[rank].append(i)
        loads[rank] += costs[i]
    return owned


def orthogonalize_replicated(
    orthogonalize: Orthogonalize, matrices: list[Tensor], group: dist.ProcessGroup | None = None
) -> list[Tensor]:
    """`orthogonalize` of matrices that all ranks of `group` have, each computed by one of them.

    One all-gather exchanges all results. One for each batch of matrices could run while the next
    batch is computed, but a network has about two batches, so that little would be gained.
    """
    owned = assign([matrix.shape for matrix in matrices], dist.get_world_size(group))
    sizes = [sum(matrices[i].numel() for i in indices) for indices in owned]
    rank = dist.get_rank(group)
    results = orthogonalize([matrices[i] for i in owned[rank]])
    padding = matrices[0].new_zeros(max(sizes) - sizes[rank])
    sent = torch.cat([*(result.flatten() for result in results), padding]).to(RESULT_DTYPE)
    received = sent.new_empty(len(owned), len(sent))
    # Not `all_gather_into_tensor`, which has another name from torch 2.13 on.
    dist.all_gather(list(received.unbind()), sent, group)
    updates = list(matrices)
    for indices, size, row in zip(owned, sizes, received.to(matrices[0].dtype), strict=True):
        parts = row[:size].split([matrices[i].numel() for i in indices])
        for i, part in zip(indices, parts, strict=True):
            updates[i] = part.view_as(matrices[i])
    return updates


def orthogonalize_sharded(
    orthogonalize: Orthogonalize,
    shards: list[Tensor],
    *,
    shapes: Sequence[Sequence[int]],
    group: dist.ProcessGroup,
) -> list[Tensor]:
    """The shards of `orthogonalize` of matrices (R, C), each computed by one rank of `group`.

    `shards` are this rank's rows of each matrix, cut as `torch.chunk` does, so perhaps none. One
    all-to-all brings all shards, in their own dtype, to the ranks that own the matrices; another
    brings the results back.
    """
    owned = assign(shapes, dist.get_world_size(group))
    mine = owned[dist.get_rank(group)]
    rows = [_rows_of_shards(shapes[i][0], len(owned)) for i in mine]
    # Numbers sent to each rank, for the matrices that it owns, and received from each, for ours.
    sent = [sum(shards[i].numel() for i in indices) for indices in owned]
    sizes = [
        [cut[rank] * shapes[i][1] for i, cut in zip(mine, rows, strict=True)]
        for rank in range(len(owned))
    ]
    received = [sum(of_rank) for of_rank in sizes]

    order = list(chain.from_iterable(owned))
    flat = torch.cat([shards[i].flatten() for i in order])
    parts = _all_to_all(flat, sent, received, group).split(list(chain.from_iterable(sizes)))
    whole = [torch.cat(parts[j :: len(mine)]).view(*shapes[i]) for j, i in enumerate(mine)]
    results = [m.split(cut) for m, cut in zip(orthogonalize(whole), rows, strict=True)]
    back = [result[rank].flatten() for rank in range(len(owned)) for result in results]
    flat = torch.cat([flat[:0], *back]).to(RESULT_DTYPE)
    flat = _all_to_all(flat, received, sent, group).to(shards[0].dtype)
    updates = list(shards)
    for i, part in zip(order, flat.split([shards[i].numel() for i in order]), strict=True):
        updates[i] = part.view_as(shards[i])
    return updates


def _rows_of_shards(rows: int, ranks: int) -> list[int]:
    """The number of rows of each rank's shard, cut as `torch.chunk` does."""
    size = -(-rows // ranks)
    return [max(0, min(size, rows - rank * size)) for rank in range(ranks)]


def _all_to_all(
    flat: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Send `sent[n]` numbers of `flat` to rank n, in order; returns those that come back."""
    result = flat.new_empty(sum(received))
    dist.all_to_all_single(result, flat, received, sent, group)
    return result
