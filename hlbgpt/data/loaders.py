"""Two ways through a token file, at random for training and in order for validation; prompts.

Shapes: B windows a batch, T predicted tokens a window. A batch is one (B, T + 1) uint16 tensor:
`[:, :-1]` are the inputs, `[:, 1:]` the targets.
"""

from collections.abc import Iterator

import numpy as np
import torch

from hlbgpt.utils.clock import Stopwatch

# Fills short windows up to T + 1; no tokenizer here has so many tokens.
PADDING = 0xFFFF


class TokenStream:
    """Training windows at random, without replacement, pass after pass.

    A pass cuts the tokens into windows from a random phase and shuffles them; every window comes
    once a pass. Batch i is computed from (seed, i) alone, so the state is a few integers. Each of
    `world_size` ranks takes its own rows of the global batch.

    Args:
        tokens: (N,) uint16.
        batch_size: B, windows a batch and rank.
        sequence_length: T, predicted tokens a window.
        seed: Determines phases and order.
        rank: Which share this stream hands out.
        world_size: Number of shares.

    The shape of batches may change on the way (`reshape`).

    Attributes:
        wait: Time that went into making batches.
        hands_out_places: Whether to hand out `places`, for tokens that lie on the device.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        # Windows that fit from every phase: the first starts at T - 1 at the latest.
        self.windows_per_pass = _windows_per_pass(len(tokens), sequence_length)
        self._tokens = tokens
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self._first_shape = batch_size, sequence_length
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.next_batch = self._origin = 0
        self.wait, self.hands_out_places = Stopwatch(), False
        self._pass: tuple[int, np.ndarray] | None = None
        self._require_batch(self.windows_per_pass, batch_size, sequence_length)

    def _require_batch(self, windows: int, batch_size: int, sequence_length: int) -> None:
        if windows < (rows := batch_size * self.world_size):
            raise ValueError(
                f"{len(self._tokens)} tokens hold {windows} windows of {sequence_length}, fewer "
                f"than a batch of {rows}"
            )

    def __len__(self) -> int:
        """Whole batches in a pass."""
        return self.windows_per_pass // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Batches without end, from where the stream stands; only taking one moves it on."""
        while True:
            self.wait.start()
            take = self.places if self.hands_out_places else self.batch
            batch = take(self.next_batch)
            self.wait.stop()
            self.next_batch += 1
            yield batch

    def batch(self, index: int) -> torch.Tensor:
        """Batch `index` counted from the start of training (or of a new order): (B, T + 1)."""
        windows = np.lib.stride_tricks.sliding_window_view(self._tokens, self.sequence_length + 1)
        return torch.from_numpy(windows[self._starts_of_batch(index)])

    def places(self, index: int) -> torch.Tensor:
        """Where the windows of batch `index` start, and their length T: (B, 2) int64."""
        starts = self._starts_of_batch(index)
        return torch.from_numpy(np.stack([starts, np.full_like(starts, self.sequence_length)], 1))

    def _starts_of_batch(self, index: int) -> np.ndarray:
        first = self._origin + (index * self.world_size + self.rank) * self.batch_size
        return self._starts(first, first + self.batch_size)

    def reshape(self, batch_size: int, sequence_length: int) -> None:
        """Hand out batches of another shape from the next one on.

        With the same sequence length the order of the windows goes on; with another there is
        another order, which starts with a new pass. Raises ValueError for a shape too large.
        """
        if (batch_size, sequence_length) == (self.batch_size, self.sequence_length):
            return
        state = self.state_dict()
        windows = _windows_per_pass(len(self._tokens), sequence_length)
        self._require_batch(windows, batch_size, sequence_length)
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self.windows_per_pass, self._pass = windows, None
        self._go_on(state)

    def _starts(self, first: int, end: int) -> np.ndarray:
        """Where windows `first` to `end`, counted over all passes, start in the tokens."""
        parts = []
        while first < end:
            number, place = divmod(first, self.windows_per_pass)
            if self._pass is None or self._pass[0] != number:
                self._pass = number, self._pass_starts(number)
            parts.append(self._pass[1][place : place + end - first])
            first += len(parts[-1])
        return np.concatenate(parts)

    def _pass_starts(self, number: int) -> np.ndarray:
        """(windows_per_pass,) starts of the windows of a pass, in the order of the pass."""
        random = np.random.Generator(np.random.PCG64([self.seed, number]))
        phase = random.integers(self.sequence_length)
        return phase + self.sequence_length * random.permutation(self.windows_per_pass)

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "tokens": len(self._tokens),
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "world_size": self.world_size,
        }

    def state_dict(self) -> dict[str, int]:
        rows, length = self._first_shape
        first = {"first_batch_size": rows, "first_sequence_length": length}
        return {"next_batch": self.next_batch, "origin": self._origin, **first, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken, in the shape that batches had there.

        Where the stream was made with another shape, its own holds. With a batch of another size
        the order of the windows goes on; with another text, seed or sequence length there is
        another order, which starts with a new pass.
        """
        first = [state.get(f"first_{key}", state[key]) for key in ("batch_size", "sequence_length")]
        if tuple(first) == self._first_shape:
            self.batch_size, self.sequence_length = state["batch_size"], state["sequence_length"]
            self.windows_per_pass = _windows_per_pass(len(self._tokens), self.sequence_length)
            self._pass = None
        self._go_on(state)

    def _go_on(self, state: dict[str, int]) -> None:
        """Take the place of `state` over into this stream's shape."""
        self.next_batch, self._origin = state["next_batch"], state["origin"]
        ours = self._identity()
        changed = {key for key in ours if ours[key] != state[key]}
        if not changed:
            return
        rows = state["batch_size"] * state["world_size"]
        self._origin, self.next_batch = state["origin"] + state["next_batch"] * rows, 0
        if changed - {"batch_size", "world_size"}:
            windows = _windows_per_pass(state["tokens"], state["sequence_length"])
            passes = -(-self._origin // windows)
            self._origin = passes * self.windows_per_pass


def _windows_per_pass(tokens: int, sequence_length: int) -> int:
    return max(0, tokens - sequence_length) // sequence_length


class WindowStream:
    """Every token but the first predicted exactly once, in consecutive windows of T targets.

    The last window may be shorter; it and the last batch are filled up with PADDING, so that all
    batches have one shape. Ranks take turns, window by window.

    Args:
        tokens: (N,) uint16, at least two.
        batch_size: B, windows a batch and rank.
        sequence_length: T, predicted tokens a window.
        rank: Which share this stream hands out.
        world_size: Number of shares.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        batch_size: int,
        sequence_length: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(tokens) < 2:
            raise ValueError(f"{len(tokens)} tokens: nothing to predict")
        self._tokens = tokens
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self.rank, self.world_size = rank, world_size
        self._windows = -(-(len(tokens) - 1) // sequence_length)

    def __len__(self) -> int:
        """Batches, the same number on every rank."""
        return -(-self._windows // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[torch.Tensor]:
        for index in range(len(self)):
            yield self.batch(index)

    def batch(self, index: int) -> torch.Tensor:
        """Batch `index`: (B, T + 1) uint16."""
        batch = np.full((self.batch_size, self.sequence_length + 1), PADDING, dtype=np.uint16)
        for row in range(self.batch_size):
            window = (index * self.batch_size + row) * self.world_size + self.rank
            start = window * self.sequence_length
            tokens = self._tokens[start : start + self.sequence_length + 1]
            if window < self._windows:
                batch[row, : len(tokens)] = tokens
        return torch.from_numpy(batch)


class PromptStream:
    """Prompts in batches: lists of (t,) int64 tensors, each of a length of its own.

    Args:
        prompts: The tokens of each.
        batch_size: Prompts in a batch, at most.
    """

    def __init__(self, prompts: list[list[int]], batch_size: int) -> None:
        self._prompts, self.batch_size = prompts, batch_size

    def __len__(self) -> int:
        return -(-len(self._prompts) // self.batch_size)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        for start in range(0, len(self._prompts), self.batch_size):
            batch = self._prompts[start : start + self.batch_size]
            yield [torch.tensor(prompt, dtype=torch.int64) for prompt in batch]
