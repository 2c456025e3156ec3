"""KV cache for incremental decoding.

Shapes: B sequences, T new tokens of each, L tokens of the longest sequence including new ones.
"""

from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class KVCache:
    """Keys, values and other past states of B sequences, which may differ in length.

    A forward pass calls `prepare` first, then `append` or `shift` in every layer that uses earlier
    tokens, each with a unique key, and `advance` last.

    Args:
        batch_size: B.
        max_length: Maximum number of tokens of a sequence.

    Attributes:
        lengths: Number of cached tokens of each sequence.
        max_length: As above.
        positions: (B, T) int64, positions of the new tokens. This and the following attributes are
            set by `prepare`.
        distance: (B, T, L) int64, position of each token minus that of each new token; above 0 for
            later tokens.
        mask: (B, 1, T, L) bool, True where a new token may attend; None if it may everywhere.
    """

    positions: Tensor
    distance: Tensor
    mask: Tensor | None

    def __init__(self, batch_size: int, max_length: int) -> None:
        self.max_length = max_length
        self.lengths = [0] * batch_size
        self._states: dict[Hashable, Tensor] = {}  # (B, max_length, ...)
        self._tails: dict[Hashable, Tensor] = {}  # (B, count, ...), the last tokens for `shift`

    def prepare(self, tokens: Tensor) -> None:
        """Set the positions and the mask for new tokens (B, T).

        Raises:
            ValueError: There are too many tokens, or sequences, for the cache.
        """
        new, end = tokens.shape[1], max(self.lengths) + tokens.shape[1]
        if len(tokens) != len(self.lengths) or end > self.max_length:
            raise ValueError(
                f"KV cache of {len(self.lengths)} sequences of at most {self.max_length} tokens: "
                f"cannot take {len(tokens)} of {end}"
            )
        starts = torch.tensor(self.lengths, device=tokens.device)[:, None]
        self._rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        self.positions = starts + torch.arange(new, device=tokens.device)
        self.distance = torch.arange(end, device=tokens.device) - self.positions[..., None]
        all_visible = new == 1 and len(set(self.lengths)) == 1
        self.mask = None if all_visible else (self.distance <= 0)[:, None]

    def append(self, key: Hashable, new: Tensor) -> Tensor:
        """Append new states (B, T, ...) to those under `key` and return all (B, L, ...).

        Entries beyond the end of a shorter sequence are meaningless; `mask` excludes them.
        """
        states = self._get(self._states, key, new, self.max_length)
        states[self._rows, self.positions] = new
        return states[:, : self.distance.shape[-1]]

    def shift(self, key: Hashable, new: Tensor, count: int) -> Tensor:
        """Prepend the last `count` states, zeros at first, to new ones: (B, count + T, ...)."""
        states = torch.cat([self._get(self._tails, key, new, count), new], dim=1)
        self._tails[key] = states[:, new.shape[1] :]
        return states

    def advance(self, x: Tensor) -> Tensor:
        """Count the new tokens as cached and return the features (B, 1, D) of the last one."""
        self.lengths = [length + x.shape[1] for length in self.lengths]
        return x[:, -1:]

    def insert(self, row: int, other: "KVCache") -> None:
        """Replace sequence `row` by the only sequence of `other`."""
        self.lengths[row] = length = other.lengths[0]
        for key, states in other._states.items():
            ours = self._get(self._states, key, states, self.max_length)
            ours[row, :length] = states[0, :length]
        for tail in self._tails.values():
            tail[row] = 0  # for an empty `other`, which has no tails
        for key, tail in other._tails.items():
            self._get(self._tails, key, tail, tail.shape[1])[row] = tail[0]

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the sequences `rows`, in this order."""
        self.lengths = [self.lengths[row] for row in rows]
        for table in (self._states, self._tails):
            for key, value in table.items():
                table[key] = value[list(rows)]

    def _get(self, table: dict[Hashable, Tensor], key: Hashable, new: Tensor, size: int) -> Tensor:
        if key not in table:
            table[key] = new.new_zeros(len(self.lengths), size, *new.shape[2:])
        return table[key]


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, kv_cache: KVCache | None = None, key: Hashable = None
) -> Tensor:
    """Causal attention (B, H, T, d) of H heads.

    With a `kv_cache`, tokens also attend to the cached ones, and `key` identifies the layer.
    """
    if kv_cache is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    k, v = (
        kv_cache.append((key, name), part.transpose(1, 2)).transpose(1, 2)
        for name, part in (("k", k), ("v", v))
    )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=kv_cache.mask)
