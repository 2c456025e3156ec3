"""What training asks of a loader, to be replaced in a config as `data.train_loader`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from hlbgpt.data.joined_tokens import JoinedTokens
from hlbgpt.utils.clock import Stopwatch
from hlbgpt.utils.errors import InputError

_ENDLESS = 1 << 40  # steps; any length keeps Lightning from reading a batch ahead


class StepLoader(ABC):
    """Hands out the tokens of one optimizer step at a time, without end: (M, B, T + 1) int64.

    A subclass has `next_step`, `state_dict` and `load_state_dict`. Its `__init__` takes the
    arguments below by position, then settings of its own, which a config names as `init_args`. It
    is also called before a run to see whether batches fit the text, so it should not take long.

    Args:
        tokens: The tokens of the training split, for loaders that read them; None if the source
            has no training text.
        seed: Determines the order.
        rank: Rank of this process, of `world_size`. Each takes its own share of every step.
        world_size: Number of processes.

    Attributes:
        micro_batches: M, micro-batches of the next step.
        batch_size: B, windows of a micro-batch on each device.
        sequence_length: T, predicted tokens of a window.
        fingerprint: Tells training texts apart in records and checkpoints; only a loader that
            does not read `tokens` sets it.
        wait: Time spent on making batches.
    """

    micro_batches = 1
    batch_size = 1
    sequence_length = 1
    fingerprint = ""

    def __init__(
        self, tokens: JoinedTokens | None, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.wait = Stopwatch()

    @abstractmethod
    def next_step(self) -> Tensor:
        """Return the tokens of the next step, of the shape set last, and move on behind it."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: plain numbers and texts.

        Taken between steps on the first rank, and restored on all ranks.
        """

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises InputError for one that is no such place."""

    def token_counts(self, vocab_size: int) -> Tensor:
        """(vocab_size,) int64: how often each token occurs in this rank's share of the text.

        Only a network that starts from them asks, such as `FastGPT`. The shares of all ranks are
        the whole.
        """
        raise InputError(
            f"data.train_loader: {type(self).__name__} has no token_counts, which the network "
            "starts from; add it, or use another network"
        )

    def text_chunks(self, overlap: int) -> Iterator[Tensor]:
        """The whole training text in order, on every rank: (n,) int64 each, on any device.

        Each chunk begins with the last `overlap` tokens of the one before. Only a network that
        counts them asks, such as `FastGPT` with `ngram_order`.
        """
        raise InputError(
            f"data.train_loader: {type(self).__name__} has no text_chunks, which the network "
            "counts; add it, or use another network"
        )

    def set_step(
        self,
        *,
        micro_batches: int | None = None,
        batch_size: int | None = None,
        sequence_length: int | None = None,
    ) -> None:
        """Set number and shape of the micro-batches from the next step on; None leaves as it is.

        Raises ValueError for a shape that the loader cannot give.
        """
        self.micro_batches = micro_batches or self.micro_batches
        self.batch_size = batch_size or self.batch_size
        self.sequence_length = sequence_length or self.sequence_length

    @property
    def step_tokens(self) -> int:
        """Tokens that the next step trains on, on all devices."""
        return self.micro_batches * self.batch_size * self.sequence_length * self.world_size

    def __len__(self) -> int:
        return _ENDLESS

    def __iter__(self) -> Iterator[Tensor]:
        """Steps from where the loader stands; only taking one moves it on."""
        while True:
            self.wait.start()
            step = self.next_step()
            self.wait.stop()
            yield step


StepLoaderCallable = Callable[[JoinedTokens | None, int, int, int], StepLoader]
