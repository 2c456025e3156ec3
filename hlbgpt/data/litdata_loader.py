"""Training tokens that LitData streams from a disk or a cloud store."""

import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from hlbgpt.data.joined_tokens import JoinedTokens
from hlbgpt.data.step_loader import StepLoader
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import expand_path

_KEY = "data.train_loader"


class LitDataLoader(StepLoader):
    """Windows of tokens from LitData's shards, in LitData's order; an epoch has each window once.

    The shards come from `litdata.optimize` with `item_loader=litdata.TokensLoader()`: arrays of the
    tokens of `data.tokenizer`. A window is T + 1 tokens of a shard, and the next one begins behind
    them. The text source needs no training text. Install it with `pip install 'hlbgpt[litdata]'`.

    A resumed run continues at the same window if it has as many devices as before.

    Args:
        tokens: Not read.
        seed: Determines the order.
        rank: Rank of this process, which LitData finds out by itself.
        world_size: Number of processes, which LitData finds out by itself.
        folder: Folder or address of the shards, such as `s3://my-bucket/tokens`.
        cache_dir: Folder to which shards of a cloud store are copied; LitData's own by default.
    """

    def __init__(
        self,
        tokens: JoinedTokens | None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        folder: str,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(tokens, seed, rank, world_size)
        if find_spec("litdata") is None:
            raise InputError(
                "data.train_loader: LitDataLoader needs the package litdata; install it with "
                "pip install 'hlbgpt[litdata]'"
            )
        in_store = "://" in folder
        self.folder = folder if in_store else str(expand_path(folder, f"{_KEY}.folder"))
        self.cache_dir = cache_dir
        self.epoch = self.next_window = 0  # of this rank
        self._windows: Iterator[Tensor] | None = None  # those left of the epoch
        # The shards of a store are told apart by their address alone.
        index = folder.encode() if in_store else _read_index(Path(self.folder))
        self.fingerprint = f"{zlib.crc32(index):08x}"

    def set_step(
        self,
        *,
        micro_batches: int | None = None,
        batch_size: int | None = None,
        sequence_length: int | None = None,
    ) -> None:
        """Another sequence length begins a new epoch."""
        if sequence_length not in (None, self.sequence_length):
            self._begin_epoch(self.epoch + (self.next_window > 0))
        super().set_step(
            micro_batches=micro_batches, batch_size=batch_size, sequence_length=sequence_length
        )

    def next_step(self) -> Tensor:
        rows = [self._take() for _ in range(self.micro_batches * self.batch_size)]
        windows = torch.stack(rows).to(torch.int64)
        return windows.reshape(self.micro_batches, self.batch_size, -1)

    def _take(self) -> Tensor:
        if self._windows is None:
            self._windows = self._open()
        if (window := next(self._windows, None)) is None:
            self._begin_epoch(self.epoch + 1)
            self._windows = self._open()
            window = next(self._windows)
        self.next_window += 1
        return window

    def _begin_epoch(self, epoch: int) -> None:
        self.epoch, self.next_window, self._windows = epoch, 0, None

    def _open(self) -> Iterator[Tensor]:
        """The windows of this epoch, from the next one on."""
        import litdata

        length = self.sequence_length + 1
        dataset = litdata.StreamingDataset(
            self.folder,
            self.cache_dir,
            item_loader=litdata.TokensLoader(block_size=length),
            shuffle=True,
            seed=self.seed,
        )
        dataset.set_epoch(self.epoch + 1)
        try:
            windows = len(dataset)
        except ValueError as error:
            raise InputError(
                f"{_KEY}.folder: {self.folder!r}: {error}; write the shards with litdata.optimize "
                "and item_loader=litdata.TokensLoader()"
            ) from error
        if windows == 0:
            raise InputError(
                f"{_KEY}.folder: the shards in {self.folder!r} hold no window of {length} tokens "
                "for each device; use a smaller data.sequence_length"
            )
        if self.next_window:
            dataset.load_state_dict(dataset.state_dict(self.next_window, 0, 1))
        return iter(dataset)

    def state_dict(self) -> dict[str, int]:
        return {
            "epoch": self.epoch,
            "next_window": self.next_window,
            "sequence_length": self.sequence_length,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        keys = list(self.state_dict())
        if not all(type(state.get(key)) is int and state[key] >= 0 for key in keys):
            raise InputError(f"ckpt_path: {state} is no place in a text; use another checkpoint")
        self._begin_epoch(state["epoch"])
        self.next_window, self.sequence_length = state["next_window"], state["sequence_length"]


def _read_index(folder: Path) -> bytes:
    try:
        return (folder / "index.json").read_bytes()
    except OSError as error:
        raise InputError(
            f"{_KEY}.folder: no shards of LitData in {str(folder)!r} (index.json: "
            f"{error.strerror}); name a folder that litdata.optimize wrote"
        ) from error
