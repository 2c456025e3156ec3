"""The LightningDataModule: text and tokenizer in, batches of tokens out."""

from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import tiktoken
import torch

from hlbgpt.data.loaders import PADDING, PromptStream, TokenStream, WindowStream
from hlbgpt.data.sources import SPLITS, TextSource
from hlbgpt.data.token_file import TokenFile, identity, prepare_token_file, token_file_path
from hlbgpt.data.tokenizer import VOCAB_SIZES, TokenizerName, load_tokenizer
from hlbgpt.utils.errors import InputError, require_positive
from hlbgpt.utils.seed import run_seed

IGNORE = -1  # target without a loss

_COUNTED_AT_ONCE = 1 << 22

_SPLITS_OF_STAGE = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": (),
    None: SPLITS,
}


class TokenDataModule(L.LightningDataModule):
    """Tokens of a text in three splits, tokenized once and kept in a cache folder.

    A batch is one (B, T + 1) int64 tensor on the device; in evaluation, targets that fill up
    short windows are -1.

    Args:
        source: Where the text comes from: `hlbgpt.data.TextFolder`, `TextFiles`, `HubText`,
            `EmbeddedText`, or a class of your own.
        tokenizer: `gpt2` (50257 tokens) or `bytes` (256 tokens, nothing to download).
        sequence_length: Predicted tokens in a training window.
        micro_batch_size: Training windows in a batch, on each device.
        eval_sequence_length: Predicted tokens in a validation or test window. The benchmark asks
            for 1024, or the network's context where that is shorter.
        eval_batch_size: Validation windows in a batch, and prompts that `predict` continues at a
            time. It changes memory and speed, not the loss or the texts.
        cache_dir: Folder for the token files.
        seed: Seed of the data order; by default the run's `seed_everything`.
        prompts: Texts that `predict` continues.
        tokens_on_device: Whether the training tokens lie on the device, and batches are gathered
            there; by default on a GPU, if they take less than a tenth of its free memory.
    """

    def __init__(
        self,
        source: TextSource,
        tokenizer: TokenizerName = "gpt2",
        sequence_length: int = 1024,
        micro_batch_size: int = 16,
        eval_sequence_length: int = 1024,
        eval_batch_size: int = 16,
        cache_dir: str = "~/.cache/hlbgpt",
        seed: int | None = None,
        prompts: list[str] | str = [],  # noqa: B006 (never changed; the CLI needs a plain default)
        tokens_on_device: bool | None = None,
    ) -> None:
        super().__init__()
        require_positive(
            "data.",
            sequence_length=sequence_length,
            micro_batch_size=micro_batch_size,
            eval_sequence_length=eval_sequence_length,
            eval_batch_size=eval_batch_size,
        )
        if seed is not None and seed < 0:
            raise InputError(f"data.seed: {seed} is negative; use 0 or more")
        self.source, self.tokenizer = source, tokenizer
        self.sequence_length, self.micro_batch_size = sequence_length, micro_batch_size
        self.eval_sequence_length, self.eval_batch_size = eval_sequence_length, eval_batch_size
        self.cache_dir = Path(cache_dir).expanduser()
        self.seed = seed
        self.prompts = [prompts] if isinstance(prompts, str) else prompts
        self.files: dict[str, TokenFile] = {}
        self.tokens_on_device = tokens_on_device
        self._resident: torch.Tensor | None = None  # the training tokens on the device, as int16

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        """Loaded when first needed: training from a token file does without."""
        return load_tokenizer(self.tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of the tokenizer's tokens."""
        return VOCAB_SIZES[self.tokenizer]

    def prepare_data(self) -> None:
        """Tokenize what the cache does not hold whole; damaged files are built again.

        Raises InputError for text that cannot be read and for files of something else.
        """
        stage = self.trainer.state.fn if self.trainer else None
        for split in self._splits(stage.value if stage else None):
            prepare_token_file(self._path(split), self.source, split, lambda: self.encoding)

    def setup(self, stage: str | None = None) -> None:
        """Map the token files that `stage` needs. Raises InputError for a text too short."""
        for split in self._splits(stage):
            self.files[split] = self._open(split)
        if stage == "predict" and not (self.prompts and all(self.prompts)):
            found = "a prompt is empty" if self.prompts else "no prompt"
            raise InputError(
                f"data.prompts: {found}; give one, as in --data.prompts 'The history of'"
            )
        # Streams check what they are given: better now than after the first validation.
        if "train" in self.files:
            self.train_dataloader()
        for split in ("validation", "test"):
            if split in self.files:
                self._require_window(split)

    def _splits(self, stage: str | None) -> tuple[str, ...]:
        return _SPLITS_OF_STAGE[stage]

    def _path(self, split: str) -> Path:
        return token_file_path(self.cache_dir, self.source, split, self.tokenizer)

    def _open(self, split: str) -> TokenFile:
        file = TokenFile(self._path(split))
        made_from = identity(self.source, split)
        file.require(tokenizer=self.tokenizer, source=made_from, split=split)
        return file

    def _require_window(self, split: str) -> None:
        tokens, length = self.files[split].header.tokens, self.eval_sequence_length
        if tokens <= length:
            raise InputError(
                f"data.eval_sequence_length: {length} is longer than the {split} split, which has "
                f"{tokens} tokens; use a longer text or set it below {tokens}"
            )

    def train_dataloader(self) -> TokenStream:
        keys = "data.sequence_length, data.micro_batch_size"
        stream = self._stream(self.micro_batch_size, self.sequence_length, keys)
        stream.hands_out_places = self._resident is not None
        return stream

    def place_tokens(self, device: torch.device) -> None:
        """Lay the training tokens on `device`, if that is asked for or worth it."""
        tokens, wanted = self.files["train"].tokens, self.tokens_on_device
        if wanted is None:
            on_gpu = device.type == "cuda"
            wanted = on_gpu and tokens.nbytes < 0.1 * torch.cuda.mem_get_info(device)[0]
        if wanted:  # GPUs gather signed numbers only
            self._resident = torch.from_numpy(tokens.astype(np.uint16).view(np.int16)).to(device)

    def require_batch(self, batch_size: int, sequence_length: int, *, key: str) -> None:
        """Raise InputError, with the key of the setting, for batches larger than the text."""
        self._stream(batch_size, sequence_length, key)

    def _stream(self, batch_size: int, sequence_length: int, key: str) -> TokenStream:
        seed = self.seed if self.seed is not None else run_seed()
        try:
            return TokenStream(
                self.files["train"].tokens,
                batch_size=batch_size,
                sequence_length=sequence_length,
                seed=seed,
                **self._shares(),
            )
        except ValueError as error:
            raise InputError(
                f"{key}: train split too short: {error}; use a longer text or smaller values"
            ) from error

    def token_counts(self) -> torch.Tensor:
        """(vocab_size,) int64: how often each token comes in the training split."""
        tokens, counts = self.files["train"].tokens, np.zeros(self.vocab_size, dtype=np.int64)
        for start in range(0, len(tokens), _COUNTED_AT_ONCE):  # counting takes 8 bytes a token
            part = tokens[start : start + _COUNTED_AT_ONCE]
            counts += np.bincount(part, minlength=self.vocab_size)
        return torch.from_numpy(counts)

    def _shares(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def val_dataloader(self) -> WindowStream:
        return self._windows("validation")

    def test_dataloader(self) -> WindowStream:
        return self._windows("test")

    def _windows(self, split: str) -> WindowStream:
        return WindowStream(
            self.files[split].tokens,
            batch_size=self.eval_batch_size,
            sequence_length=self.eval_sequence_length,
            **self._shares(),
        )

    def predict_dataloader(self) -> PromptStream:
        return PromptStream([self.encode(text) for text in self.prompts], self.eval_batch_size)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """To the device as uint16, a quarter of the bytes, and to int64 there; prompts as such."""
        if isinstance(batch, list):
            return [prompt.to(device) for prompt in batch]
        if self._resident is not None and not self._evaluating:
            starts, length = batch[:, :1].to(device, non_blocking=True), int(batch[0, 1])
            places = starts + torch.arange(length + 1, device=device)
            return self._resident[places].to(torch.int64) & 0xFFFF
        if device.type == "mps":  # where torch before 2.9 has no uint16
            batch = batch.to(torch.int64)
        batch = batch.to(device, non_blocking=True).to(torch.int64)
        return batch.masked_fill_(batch == PADDING, IGNORE) if self._evaluating else batch

    @property
    def _evaluating(self) -> bool:
        trainer = self.trainer
        return trainer is not None and (
            trainer.validating or trainer.testing or trainer.sanity_checking
        )

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`."""
        return self.encoding.encode_ordinary(text)
