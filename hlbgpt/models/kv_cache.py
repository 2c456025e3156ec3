"""What a network has read of some texts, so that a next token costs one token and not all of them.

Shapes: B sequences, T new tokens of each, L tokens of the longest sequence, the new ones included.
"""

from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Cache:
    """Keys, values and the like of B sequences, each of a length of its own.

    A forward pass calls `begin`; then `extend` or `before` wherever a token looks at earlier ones,
    each with a key of its own; and at last `end`.

    Args:
        batch_size: B.
        length: Most tokens that a sequence may come to.

    Attributes:
        lengths: Tokens read of each sequence.
        places: (B, T) int64, of the new tokens; between `begin` and `end`, as the others below.
        distance: (B, T, L) int64, from each new token to each token; above 0 for later ones.
        mask: (B, 1, T, L) bool, which tokens each new one may look at; None if it is all.
    """

    places: Tensor
    distance: Tensor
    mask: Tensor | None

    def __init__(self, batch_size: int, length: int) -> None:
        self.length = length
        self.lengths = [0] * batch_size
        self._stores: dict[Hashable, Tensor] = {}  # (B, length, ...)
        self._tails: dict[Hashable, Tensor] = {}  # (B, tokens looked back at, ...)

    def begin(self, tokens: Tensor) -> None:
        """Make ready for `tokens` (B, T) behind those read. Raises ValueError if too many."""
        new, end = tokens.shape[1], max(self.lengths) + tokens.shape[1]
        if len(tokens) != len(self.lengths) or end > self.length:
            raise ValueError(
                f"cache of {len(self.lengths)} sequences of at most {self.length} tokens: cannot "
                f"take {len(tokens)} of {end}"
            )
        ends = torch.tensor(self.lengths, device=tokens.device)[:, None]
        self._rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        self.places = ends + torch.arange(new, device=tokens.device)
        self.distance = torch.arange(end, device=tokens.device) - self.places[..., None]
        alike = new == 1 and len(set(self.lengths)) == 1
        self.mask = None if alike else (self.distance <= 0)[:, None]

    def extend(self, key: Hashable, new: Tensor) -> Tensor:
        """Append `new` (B, T, ...) to what has come under `key`: all of it (B, L, ...).

        What lies behind the end of a shorter sequence means nothing; `mask` leaves it out.
        """
        store = self._get(self._stores, key, new, self.length)
        store[self._rows, self.places] = new
        return store[:, : self.distance.shape[-1]]

    def before(self, key: Hashable, new: Tensor, count: int) -> Tensor:
        """`new` (B, T, ...) after the `count` before, at first zeros: (B, count + T, ...)."""
        seen = torch.cat([self._get(self._tails, key, new, count), new], dim=1)
        self._tails[key] = seen[:, new.shape[1] :]
        return seen

    def end(self, x: Tensor) -> Tensor:
        """Count the new tokens as read: features (B, 1, D) of the last of `x` (B, T, D)."""
        self.lengths = [length + x.shape[1] for length in self.lengths]
        return x[:, -1:]

    def put(self, row: int, other: "Cache") -> None:
        """Let sequence `row` be the only one of `other`, in place of what was read of it."""
        self.lengths[row] = size = other.lengths[0]
        for key, store in other._stores.items():
            self._get(self._stores, key, store, self.length)[row, :size] = store[0, :size]
        for tail in self._tails.values():
            tail[row] = 0  # of a sequence of which nothing was read
        for key, tail in other._tails.items():
            self._get(self._tails, key, tail, tail.shape[1])[row] = tail[0]

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all sequences but `rows`, which come in this order."""
        self.lengths = [self.lengths[row] for row in rows]
        for table in (self._stores, self._tails):
            for key, value in table.items():
                table[key] = value[list(rows)]

    def _get(self, table: dict[Hashable, Tensor], key: Hashable, new: Tensor, size: int) -> Tensor:
        if key not in table:
            table[key] = new.new_zeros(len(self.lengths), size, *new.shape[2:])
        return table[key]


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: Cache | None = None, key: Hashable = None
) -> Tensor:
    """Attention of H heads (B, H, T, d) to what came before; with a cache also what it holds."""
    if cache is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    k, v = (
        cache.extend((key, name), part.transpose(1, 2)).transpose(1, 2)
        for name, part in (("keys", k), ("values", v))
    )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask)
