"""Shares out the matrices of Muon over ranks, so that each is orthogonalized only once.

A rank is a process of a distributed run. All ranks make the same calls, with gradients for the same
parameters. Results travel in bf16, which is what Newton-Schulz computes in, so that nothing is
lost and the results of all ranks are equal to the last bit.

Shapes: matrices of R rows and C columns.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Orthogonalize = Callable[[list[Tensor]], list[Tensor]]
RESULT_DTYPE = torch.bfloat16


def world_size() -> int:
    """The number of ranks; 1 if this process is alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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

    One all-gather exchanges all results: simpler than one for each batch of matrices, and little
    would be gained by computing meanwhile, since it takes less time than the products.
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
