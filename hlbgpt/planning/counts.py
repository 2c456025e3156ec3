"""What operations compute and move, counted while torch runs them, on fake tensors too."""

import weakref
from collections import Counter
from collections.abc import Iterable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

_LOOKUPS = ("embedding", "gather", "index", "scatter")  # parts of names of operations
_aten = torch.ops.aten


class Work(NamedTuple):
    """What takes time on a GPU."""

    flops: float = 0  # FLOPs of products of 16-bit numbers, attention included
    fp32_flops: float = 0  # the same of fp32 numbers
    fused: float = 0  # bytes that a compiler which fuses whole chains of operations moves
    unfused: float = 0  # bytes that operations run one by one move

    @classmethod
    def total(cls, parts: Iterable[tuple[int, "Work"]]) -> "Work":
        """The sum of `parts`, each done a number of times."""
        columns = zip(*([times * count for count in work] for times, work in parts), strict=True)
        return cls(*map(sum, columns))


class WorkCounter(TorchDispatchMode):
    """Counts the work of all operations inside `with`.

    Matrix products and attention have FLOPs and no traffic of their own: reading and writing
    their operands overlaps with computing, and is part of the rate that they reach. Attention
    counts in full: kernels skip the masked half, but run at about half the rate of products.

    Unfused traffic: each other operation reads its inputs and writes its outputs; views are free.

    Fused traffic: what a compiler has to move that runs each chain of elementwise operations and
    reductions as one kernel, whose intermediate results never reach memory. Left over are
    - reading what a chain takes from outside: parameters, results of products and of lookups,
    - writing what a chain makes for a product or a lookup,
    - writing and reading what a chain of the forward pass makes for one of the backward pass,
    - lookups (gather and scatter), which read their inputs and write their outputs.
    A tensor is written once, and read once in each pass.

    Attributes:
        backward: Whether operations belong to the backward pass; to be set by the caller.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backward = False
        self._flops: Counter[bool] = Counter()  # by whether of fp32
        self._unfused = self._lookups = 0
        self._moved: Counter[tuple[int, str]] = Counter()  # by storage, and "write" or the pass
        self._made: dict[int, tuple[bool, bool]] = {}  # by a chain? in the backward pass?
        self._storages: dict[int, torch.UntypedStorage] = {}  # alive, so that no number recurs

    @property
    def work(self) -> Work:
        """What was counted so far."""
        fused = self._lookups + sum(self._moved.values())
        return Work(self._flops[False], self._flops[True], fused, self._unfused)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs, outputs = self._bytes((args, kwargs)), self._bytes(out)
        if outputs.keys() <= inputs.keys() and not func._schema.is_mutable:
            return out  # a view
        name = func.overloadpacket
        if product := name in flop_registry:
            fp32 = _tensors(out)[0].dtype == torch.float32
            self._flops[fp32] += flop_registry[name](*args, **kwargs, out_val=out)
        size = 0 if product else inputs.total() + outputs.total()
        lookup = any(word in str(name) for word in _LOOKUPS)
        self._unfused += size
        self._lookups += size if lookup else 0
        chain = not (product or lookup)
        for storage, read in inputs.items():
            self._read(storage, read, chain)
        self._made |= dict.fromkeys(outputs, (chain, self.backward))
        return out

    def _read(self, storage: int, read: int, chain: bool) -> None:
        """Count what it takes that a chain, or another operation, reads a storage."""
        by_chain, in_backward = self._made.get(storage, (False, False))
        size = self._storages[storage].nbytes()
        kept = by_chain and in_backward != self.backward
        if kept or (by_chain and not chain):
            self._moved[storage, "write"] = size
        if chain and (kept or not by_chain):
            key = storage, "backward" if self.backward else "forward"
            self._moved[key] = min(size, self._moved[key] + read)

    def _bytes(self, tree: Any) -> Counter[int]:
        """Bytes of the tensors in `tree`, by storage; an expanded tensor is as large as that."""
        sizes: Counter[int] = Counter()
        for tensor in _tensors(tree):
            storage = tensor.untyped_storage()
            key = storage._cdata
            self._storages[key] = storage
            sizes[key] = min(storage.nbytes(), sizes[key] + tensor.nbytes)
        return sizes


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside `with` take at a time.

    Attributes:
        peak: Bytes so far, of storages that were not there before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._bytes = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for storage in (tensor.untyped_storage() for tensor in _tensors(out)):
            if storage._cdata not in inputs and storage._cdata not in self._alive:
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def free(_: Any) -> None:
            self._bytes -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, free)
        self._bytes += size
        self.peak = max(self.peak, self._bytes)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# Operations for which torch has no formulas; arguments are shapes. First Muon's products, then the
# attention kernels of CPUs, (B, H, T, d).
@register_flop_formula(_aten.baddbmm_)
def _in_place_product_flops(total: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(a) * b[-1]


@register_flop_formula(_aten._scaled_dot_product_flash_attention_for_cpu)
def _attention_flops(q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    return 4 * prod(q) * k[-2]


@register_flop_formula(_aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward_flops(grad: Any, q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    return 10 * prod(q) * k[-2]
