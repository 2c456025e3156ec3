"""Loaders: random windows for training, consecutive windows for evaluation.

Shapes: M micro-batches of an optimizer step, B windows of a micro-batch on each device, T predicted
tokens of a window. A window is T + 1 tokens: `[:-1]` are the inputs, `[1:]` the targets.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hlbgpt.data.joined_tokens import JoinedTokens
from hlbgpt.data.step_loader import StepLoader
from hlbgpt.utils.errors import InputError

_BLOCK = 1 << 14  # windows whose order is drawn at a time
_COUNTED = 1 << 20  # tokens that are counted at a time
_COPIED = 1 << 24  # tokens that are copied to a device at a time


class TrainLoader(StepLoader):
    """Random windows of the training tokens: (M, B, T + 1) int64 for each optimizer step.

    An epoch cuts the tokens into windows from a random phase and shuffles them, so that every
    window comes once. Each of `world_size` ranks takes its own windows of a micro-batch. Phase and
    order depend on the seed and the epoch alone, and the order is drawn as it is needed; the state
    is where the next window is.

    Args:
        tokens: (N,) uint16, or uint32 below 2^31, in one array or several.
        seed: Determines phases and orders.
        rank: Rank of this process, of `world_size`.
        world_size: Number of processes.

    Raises:
        InputError: There are no tokens.
    """

    def __init__(
        self,
        tokens: JoinedTokens | np.ndarray | None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if tokens is None:
            raise InputError(
                "data.source: no text for the train split; set folder or train of "
                "hlbgpt.data.TextFiles, or data.train_loader to a loader with tokens of its own"
            )
        self._tokens = JoinedTokens([tokens]) if isinstance(tokens, np.ndarray) else tokens
        super().__init__(self._tokens, seed, rank, world_size)
        self._device_tokens: Tensor | None = None
        # Of a token among its bits.
        self._mask = 0xFFFF if self._tokens.dtype.itemsize == 2 else 0x7FFFFFFF
        self.epoch = self.next_window = 0
        self._block: tuple[Any, np.ndarray] = (None, np.empty(0, dtype=np.int64))
        self._position_of = self._data_identity()

    def set_step(
        self,
        *,
        micro_batches: int | None = None,
        batch_size: int | None = None,
        sequence_length: int | None = None,
    ) -> None:
        """Set number and shape of the micro-batches from the next step on; None leaves as it is.

        Another sequence length cuts the tokens anew, which begins a new epoch. Raises ValueError
        for a micro-batch larger than the text.
        """
        length = sequence_length or self.sequence_length
        rows = batch_size or self.batch_size
        windows = self.windows_per_epoch(length)
        if windows < rows * self.world_size:
            raise ValueError(
                f"{len(self._tokens)} tokens hold {windows} windows of {length}, fewer "
                f"than a batch of {rows * self.world_size}"
            )
        super().set_step(micro_batches=micro_batches, batch_size=rows, sequence_length=length)

    def windows_per_epoch(self, sequence_length: int) -> int:
        """Number of windows that fit for any phase from 0 to T - 1."""
        return max(0, len(self._tokens) - sequence_length) // sequence_length

    def keep_tokens_on(self, device: torch.device) -> None:
        """Copy all tokens to `device`, where batches are gathered from then on."""
        # torch cannot index unsigned tokens on a GPU, so their bits are stored as signed ones.
        dtype = torch.int16 if self._tokens.dtype.itemsize == 2 else torch.int32
        kept = torch.empty(len(self._tokens), dtype=dtype, device=device)
        for start in range(0, len(kept), _COPIED):
            part = self._tokens[start : start + _COPIED]
            kept[start : start + _COPIED] = torch.from_numpy(part.astype(f"i{part.itemsize}"))
        self._device_tokens = kept

    def token_counts(self, vocab_size: int) -> Tensor:
        """(vocab_size,) int64: how often each token occurs in this rank's share of the tokens.

        The shares of all ranks are the whole. On the device if the tokens are.
        """
        start, stop = (
            rank * len(self._tokens) // self.world_size for rank in (self.rank, self.rank + 1)
        )
        if (kept := self._device_tokens) is not None:
            counts = torch.zeros(vocab_size, dtype=torch.int64, device=kept.device)
            for first in range(start, stop, _COPIED):
                part = self._kept(slice(first, min(stop, first + _COPIED)))
                counts += torch.bincount(part, minlength=vocab_size)
            return counts
        on_host = np.zeros(vocab_size, dtype=np.int64)
        for first in range(start, stop, _COUNTED):
            tokens = self._tokens[first : min(stop, first + _COUNTED)]
            on_host += np.bincount(tokens, minlength=vocab_size)
        return torch.from_numpy(on_host)

    def text_chunks(self, overlap: int) -> Iterator[Tensor]:
        for start in range(0, len(self._tokens), _COPIED):
            part = slice(max(0, start - overlap), start + _COPIED)
            if self._device_tokens is not None:
                yield self._kept(part)
            else:
                yield torch.from_numpy(self._tokens[part].astype(np.int64))

    def next_step(self) -> Tensor:
        return self._gather(self._next_offsets())

    def _gather(self, offsets: np.ndarray) -> Tensor:
        """Windows that start at `offsets` (M, B): (M, B, T + 1) int64."""
        if self._device_tokens is None:
            windows = self._tokens.windows(offsets, self.sequence_length + 1)
            return torch.from_numpy(windows.astype(np.int64))
        device = self._device_tokens.device
        start = torch.from_numpy(offsets).to(device, non_blocking=True)
        places = start[..., None] + torch.arange(self.sequence_length + 1, device=device)
        return self._kept(places)

    def _kept(self, index: slice | Tensor) -> Tensor:
        """Tokens that are kept on the device, int64."""
        assert self._device_tokens is not None
        return self._device_tokens[index].to(torch.int64) & self._mask

    def _next_offsets(self) -> np.ndarray:
        """Where this rank's windows of the next step start in the tokens: (M, B) int64."""
        if self._position_of != (identity := self._data_identity()):
            self.epoch += self.next_window > 0
            self.next_window, self._position_of = 0, identity
        count = self.micro_batches * self.world_size * self.batch_size
        parts = []
        while count:
            block = self._block_offsets(self.next_window // _BLOCK)
            parts.append(block[self.next_window % _BLOCK :][:count])
            count -= len(parts[-1])
            self.next_window += len(parts[-1])
            if self.next_window == self.windows_per_epoch(self.sequence_length):
                self.epoch, self.next_window = self.epoch + 1, 0
        shape = self.micro_batches, self.world_size, self.batch_size
        return np.concatenate(parts).reshape(shape)[:, self.rank]

    def _block_offsets(self, block: int) -> np.ndarray:
        """Where a block of the epoch's windows starts in the tokens, in the epoch's order."""
        if self._block[0] != (key := (self.epoch, self.sequence_length, block)):
            seed = [self.seed, self.epoch]
            phase = np.random.Generator(np.random.PCG64(seed)).integers(self.sequence_length)
            windows = self.windows_per_epoch(self.sequence_length)
            places = np.arange(block * _BLOCK, min(windows, (block + 1) * _BLOCK))
            self._block = key, phase + self.sequence_length * shuffled(places, windows, seed)
        return self._block[1]

    def _data_identity(self) -> dict[str, int]:
        """What determines the order of the windows: a position means nothing with another."""
        length = self.sequence_length
        return {"seed": self.seed, "tokens": len(self._tokens), "sequence_length": length}

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "next_window": self.next_window, **self._position_of}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken; with another text or seed, in a new epoch.

        Raises InputError for a place outside the text.
        """
        keys = ("epoch", "next_window", *self._data_identity())
        if not all(type(state.get(key)) is int and 0 <= state[key] < 1 << 53 for key in keys):
            raise InputError(f"ckpt_path: {state} is no place in a text; use another checkpoint")
        length = max(1, state["sequence_length"])
        windows = max(0, state["tokens"] - length) // length
        if state["next_window"] >= windows:
            raise InputError(
                f"ckpt_path: the checkpoint continues at window {state['next_window']} of "
                f"{windows}; it is damaged, use another"
            )
        self.epoch, self.next_window = state["epoch"], state["next_window"]
        self._position_of = {key: state[key] for key in self._data_identity()}


class EvalLoader:
    """Consecutive windows of T targets, in which every token but the first is predicted once.

    The last window may be shorter. It and the last batch are filled up with -1, so that all
    batches have one shape, (B, T + 1) int64. Ranks take turns, window by window.

    There must be at least two tokens, in one array or several. The other arguments are those of
    `StepLoader`.
    """

    def __init__(
        self,
        tokens: JoinedTokens | np.ndarray,
        *,
        batch_size: int,
        sequence_length: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert len(tokens) > 1, "nothing to predict"
        self._tokens = tokens
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self.rank, self.world_size = rank, world_size
        self._windows = -(-(len(tokens) - 1) // sequence_length)

    def __len__(self) -> int:
        """Batches, the same number on every rank."""
        return -(-self._windows // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Tensor]:
        own_windows = iter(range(self.rank, self._windows, self.world_size))
        for _ in range(len(self)):
            batch = np.full((self.batch_size, self.sequence_length + 1), -1, dtype=np.int64)
            for row, window in enumerate(islice(own_windows, self.batch_size)):
                start = window * self.sequence_length
                tokens = self._tokens[start : start + self.sequence_length + 1]
                batch[row, : len(tokens)] = tokens
            yield torch.from_numpy(batch)


def shuffled(places: np.ndarray, size: int, seed: list[int]) -> np.ndarray:
    """What a random permutation of `size` numbers has at `places` (n,): (n,) int64.

    The permutation is never in memory: it is a Feistel network, a bijection of the numbers below a
    power of 4, applied until the result is below `size` (Black and Rogaway, 2002).
    """
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence(seed).generate_state(8, np.uint64)
    result, left_over = places.astype(np.uint64), np.arange(len(places))
    while len(left_over):
        high, low = result[left_over] >> half, result[left_over] & mask
        for key in keys:
            mixed = (low ^ key) * np.uint64(0xBF58476D1CE4E5B9)  # as in splitmix64
            mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
            high, low = low, high ^ ((mixed >> np.uint64(32)) & mask)
        result[left_over] = high << half | low
        left_over = left_over[result[left_over] >= size]
    return result.astype(np.int64)
