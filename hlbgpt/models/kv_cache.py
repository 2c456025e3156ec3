"""KV cache for incremental decoding, and the functions through which layers use it.

Shapes: B sequences, T new tokens of each, L tokens of the longest sequence including new ones.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class KVCache:
    """Keys, values and other past states of B sequences, which may differ in length.

    A forward pass calls `prepare` first, then `append` or `shift` in every layer that uses earlier
    tokens, each with a unique key, and `advance` last.

    Attributes:
        lengths: Number of cached tokens of each sequence; `max_length` is their maximum.
        positions: (B, T) int64, positions of the new tokens; this and the following are set by
            `prepare`.
        distance: (B, T, L) int64, position of each token minus that of each new token.
        mask: (B, 1, T, L) bool, True where a new token may attend; None if it may everywhere.
    """

    positions: Tensor
    distance: Tensor
    mask: Tensor | None

    def __init__(self, batch_size: int, max_length: int) -> None:
        self.lengths, self.max_length = [0] * batch_size, max_length
        self._states: dict[Hashable, Tensor] = {}  # (B, max_length, ...)
        self._weights: dict[Hashable, Tensor] = {}

    def prepare(self, tokens: Tensor) -> None:
        """Set the positions and the mask for new tokens (B, T)."""
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
        states = self._get(key, new)
        states[self._rows, self.positions] = new
        return states[:, : self.distance.shape[-1]]

    def shift(self, key: Hashable, new: Tensor, count: int) -> Tensor:
        """Prepend the last `count` states, zeros at first, to new ones: (B, count + T, ...)."""
        states, back = self.append(key, new), torch.arange(-count, 0, device=new.device)
        index = self.positions[:, :1] + back  # (B, count)
        previous = states[self._rows, index.clamp(min=0)]
        previous[index < 0] = 0
        return torch.cat([previous, new], dim=1)

    def weights(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` returns from the weights, which do not change: computed once."""
        if key not in self._weights:
            self._weights[key] = compute()
        return self._weights[key]

    def advance(self, x: Tensor) -> Tensor:
        """Count the new tokens as cached and return the features (B, 1, D) of the last one."""
        self.lengths = [length + x.shape[1] for length in self.lengths]
        return x[:, -1:]

    def insert(self, row: int, other: "KVCache") -> None:
        """Replace sequence `row` by the only sequence of `other`."""
        self.lengths[row] = length = other.lengths[0]
        for key, states in other._states.items():
            self._get(key, states)[row, :length] = states[0, :length]

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the sequences `rows`, in this order."""
        self.lengths = [self.lengths[row] for row in rows]
        self._states = {key: states[list(rows)] for key, states in self._states.items()}

    def _get(self, key: Hashable, new: Tensor) -> Tensor:
        if key not in self._states:
            size = (len(self.lengths), self.max_length, *new.shape[2:])
            self._states[key] = new.new_zeros(size)
        return self._states[key]


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_cache: KVCache | None = None,
    key: Hashable = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention (B, H, T, d) of H heads, with a `kv_cache` also to cached tokens.

    `key` identifies the layer. Scores are multiplied by `scale`, by default 1 / sqrt(d).
    """
    if kv_cache is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    k, v = (
        kv_cache.append((key, name), part.transpose(1, 2)).transpose(1, 2)
        for name, part in (("k", k), ("v", v))
    )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=kv_cache.mask, scale=scale)


def earlier(
    x: Tensor, count: int, kv_cache: KVCache | None = None, key: Hashable = None
) -> list[Tensor]:
    """States `x` (B, T, ...) of 1 to `count` tokens before each, zeros before the first."""
    length, rest = x.shape[1], [0, 0] * (x.ndim - 2)
    if kv_cache is None:
        kept = (max(0, length - back) for back in range(1, count + 1))
        # torch.compile fuses `pad` with what follows, and stores the result of `cat`.
        return [F.pad(x[:, :part], (*rest, length - part, 0)) for part in kept]
    states = kv_cache.shift(key, x, count)  # (B, count + T, ...)
    return [states[:, count - back :][:, :length] for back in range(1, count + 1)]


def token_positions(tokens: Tensor, kv_cache: KVCache | None = None) -> Tensor:
    """Positions of new tokens (B, T): (T,), or (B, T) with a `kv_cache`, which this prepares."""
    if kv_cache is None:
        return torch.arange(tokens.shape[1], device=tokens.device)
    kv_cache.prepare(tokens)
    return kv_cache.positions


def token_distance(tokens: Tensor, kv_cache: KVCache | None = None) -> Tensor:
    """Position of each token minus that of each new one (B, T): (T, T), or cached (B, T, L)."""
    if kv_cache is not None:
        return kv_cache.distance
    position = torch.arange(tokens.shape[1], device=tokens.device)
    return position - position[:, None]
