"""The LightningDataModule: text and tokenizer in, batches of tokens out."""

from functools import cached_property
from math import prod
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from hlbgpt.data.loaders import EvalLoader, TrainLoader
from hlbgpt.data.prepare import Part, parts_of, prepare_token_files
from hlbgpt.data.sources import SPLITS, TextSource
from hlbgpt.data.step_loader import StepLoader, StepLoaderCallable
from hlbgpt.data.token_file import TokenFiles
from hlbgpt.data.tokenizer import Tokenizer, load_tokenizer, require_tokenizer
from hlbgpt.utils.errors import MOST_BATCH_TOKENS, InputError, require_positive
from hlbgpt.utils.files import expand_path
from hlbgpt.utils.seed import run_seed

_TRAIN_SHAPE = "data.sequence_length, data.micro_batch_size"

_SPLITS_OF_STAGE = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": (),
    None: SPLITS,
}


class TokenDataModule(L.LightningDataModule):
    """Tokens of a text in three splits, tokenized once and kept in a cache folder.

    A training batch is one optimizer step: (micro_batches, B, T + 1) int64. An evaluation batch is
    (B, T + 1) int64, where -1 fills up short windows.

    Args:
        source: Where the text comes from: `hlbgpt.data.TextFolder`, `TextFiles`, `HubText`,
            `PythonDocs`, or your own subclass of `TextSource`.
        tokenizer: `gpt2` (50257 tokens), `bytes` (256 tokens, nothing to download), or another
            encoding of tiktoken, such as `cl100k_base` or `o200k_base`.
        special_tokens: Texts that become one token each, in the text as in prompts, such as
            `["<|user|>", "<|assistant|>"]`. Their numbers follow those of the tokenizer.
        sequence_length: Predicted tokens in a training window.
        micro_batch_size: Training windows in a micro-batch, which a device must hold.
        micro_batches: Micro-batches of an optimizer step. Several small ones train like a large
            one and need less memory. Several devices share them out: a step has `micro_batches` x
            `micro_batch_size` windows on all of them together. A schedule or a batch-size callback
            overrides it.
        max_tokens: Training ends with the step that reaches so many tokens; no limit by default.
            A token schedule sets it to the end of its table.
        eval_sequence_length: Predicted tokens in a validation or test window. The benchmark asks
            for 1024, or the network's context where that is shorter.
        eval_batch_size: Validation windows in a batch, and prompts that `predict` continues
            together. It changes memory and speed, not the loss or the texts.
        cache_dir: Folder for the token files.
        seed: Seed of the data order; by default the run's `seed_everything`, or 0 without one.
        prompts: Texts that `predict` continues.
        tokens_on_device: Whether to keep the training tokens on the device and gather batches
            there. By default on a GPU, if they take less than a tenth of its free memory.
        train_loader: What makes training batches: random windows of the training tokens, or your
            own subclass of `hlbgpt.data.StepLoader`.

    Attributes:
        files: The token files of the splits that are set up.
        train_fingerprint: Tells training texts apart in records and checkpoints.
    """

    def __init__(
        self,
        source: TextSource,
        tokenizer: str = "gpt2",
        special_tokens: list[str] = [],  # noqa: B006 (never changed; the CLI needs a plain default)
        sequence_length: int = 1024,
        micro_batch_size: int = 16,
        micro_batches: int = 1,
        max_tokens: int | None = None,
        eval_sequence_length: int = 1024,
        eval_batch_size: int = 16,
        cache_dir: str = "~/.cache/hlbgpt",
        seed: int | None = None,
        prompts: list[str] | str = [],  # noqa: B006
        tokens_on_device: bool | None = None,
        train_loader: StepLoaderCallable = TrainLoader,
    ) -> None:
        super().__init__()
        require_positive(
            "data.",
            sequence_length=sequence_length,
            micro_batch_size=micro_batch_size,
            micro_batches=micro_batches,
            eval_sequence_length=eval_sequence_length,
            eval_batch_size=eval_batch_size,
        )
        _require_memory(
            micro_batches=micro_batches,
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
        )
        _require_memory(eval_batch_size=eval_batch_size, eval_sequence_length=eval_sequence_length)
        if max_tokens is not None:
            require_positive("data.", max_tokens=max_tokens)
        if seed is not None and seed < 0:
            raise InputError(f"data.seed: {seed} is negative; use 0 or more")
        require_tokenizer(tokenizer)
        self.source, self.tokenizer, self.special_tokens = source, tokenizer, special_tokens
        self.sequence_length, self.micro_batch_size = sequence_length, micro_batch_size
        self.micro_batches, self.max_tokens = micro_batches, max_tokens
        self.eval_sequence_length, self.eval_batch_size = eval_sequence_length, eval_batch_size
        self.cache_dir, self.seed = expand_path(cache_dir, "data.cache_dir"), seed
        self.prompts = [prompts] if isinstance(prompts, str) else prompts
        self.tokens_on_device = tokens_on_device
        self.train_loader = train_loader
        self.files: dict[str, TokenFiles] = {}
        self.train_fingerprint = ""

    @cached_property
    def encoding(self) -> Tokenizer:
        """The tokenizer itself; training from a token file does not load it."""
        return load_tokenizer(self.tokenizer, self.special_tokens)

    @property
    def vocab_size(self) -> int:
        """Number of the tokenizer's tokens; known from a token file, or the tokenizer is loaded."""
        headers = [file.header for file in self.files.values()]
        return headers[0].vocab_size if headers else self.encoding.vocab_size

    @property
    def train_description(self) -> str:
        """How much the training split is, in words."""
        if "train" not in self.files:
            return "of data.train_loader"
        header = self.files["train"].header
        return f"{header.tokens:,} tokens ({header.tokenizer})"

    # --- set-up -------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Tokenize the splits that the cache lacks. Raises InputError for unreadable text."""
        for split in _SPLITS_OF_STAGE[self.trainer.state.fn if self.trainer else None]:
            if parts := self._parts(split):
                prepare_token_files(parts, split, lambda: self.encoding)

    def setup(self, stage: str | None = None) -> None:
        """Map the token files that `stage` needs. Raises InputError for a text too short."""
        for split in _SPLITS_OF_STAGE[stage]:
            if parts := self._parts(split):
                self.files[split] = TokenFiles([part.path for part in parts])
        if stage == "predict" and not (self.prompts and all(self.prompts)):
            found = "a prompt is empty" if self.prompts else "no prompt"
            raise InputError(
                f"data.prompts: {found}; give one, as in --data.prompts 'The history of'"
            )
        for split in self.files.keys() - {"train"}:
            tokens, length = self.files[split].header.tokens, self.eval_sequence_length
            if tokens <= length:
                raise InputError(
                    f"data.eval_sequence_length: {length} is longer than the {split} split, which "
                    f"has {tokens} tokens; use a longer text or set it below {tokens}"
                )

    def _parts(self, split: str) -> list[Part]:
        name = self.tokenizer
        return parts_of(self.cache_dir, self.source, split, name, self.special_tokens)

    def require_batch(
        self, batch_size: int, sequence_length: int, *, key: str = _TRAIN_SHAPE
    ) -> None:
        """Raise InputError, which names `key`, if the text is too short for such a micro-batch."""
        self._train_loader(1, batch_size, sequence_length, key)

    @property
    def device_batch(self) -> tuple[int, int]:
        """Micro-batches of a training step on each device, and windows in one.

        Raises InputError where the windows of a step cannot be shared out evenly.
        """
        devices = self.trainer.world_size if self.trainer else 1
        return share_out(self.micro_batches, self.micro_batch_size, devices)

    # --- loaders ------------------------------------------------------------------------------

    def train_dataloader(self) -> StepLoader:
        loader = self._train_loader(*self.device_batch, self.sequence_length, _TRAIN_SHAPE)
        if self.trainer and isinstance(loader, TrainLoader):
            device, keeps = self.trainer.strategy.root_device, self.tokens_on_device
            if keeps is None and device.type == "cuda":
                keeps = self.files["train"].tokens.nbytes < 0.1 * torch.cuda.mem_get_info(device)[0]
            if keeps:
                loader.keep_tokens_on(device)
        return loader

    def _train_loader(
        self, micro_batches: int, batch_size: int, sequence_length: int, key: str
    ) -> StepLoader:
        tokens = self.files["train"].tokens if "train" in self.files else None
        seed = self.seed if self.seed is not None else run_seed() or 0
        loader = self.train_loader(tokens, seed, *self._rank().values())
        try:
            loader.set_step(
                micro_batches=micro_batches,
                batch_size=batch_size,
                sequence_length=sequence_length,
            )
        except ValueError as error:
            raise InputError(
                f"{key}: train split too short: {error}; use a longer text or smaller values"
            ) from error
        self.train_fingerprint = loader.fingerprint or self.files["train"].header.fingerprint
        return loader

    def _rank(self) -> dict[str, int]:
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return {"rank": rank, "world_size": world_size}

    def val_dataloader(self) -> EvalLoader:
        return self._eval_loader("validation")

    def test_dataloader(self) -> EvalLoader:
        return self._eval_loader("test")

    def _eval_loader(self, split: str) -> EvalLoader:
        return EvalLoader(
            self.files[split].tokens,
            batch_size=self.eval_batch_size,
            sequence_length=self.eval_sequence_length,
            **self._rank(),
        )

    def predict_dataloader(self) -> DataLoader:
        """Batches are lists of prompts, (t,) int64 of different lengths t."""
        prompts: Any = [torch.tensor(self.encode(text)) for text in self.prompts]
        return DataLoader(prompts, batch_size=self.eval_batch_size, collate_fn=list)

    # --- tokens -------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`."""
        return self.encoding.encode(text)


def share_out(micro_batches: int, micro_batch_size: int, devices: int) -> tuple[int, int]:
    """Cut a step of `micro_batches` x `micro_batch_size` windows into equal parts for `devices`.

    Returns as few micro-batches on each device as are no larger than those, and windows in one.
    Raises InputError where the windows cannot be shared out evenly.
    """
    windows, left_over = divmod(micro_batches * micro_batch_size, devices)
    if left_over:
        raise InputError(
            f"data.micro_batches {micro_batches} x micro_batch_size {micro_batch_size}: "
            f"{micro_batches * micro_batch_size} windows of a step cannot be shared out evenly "
            f"over {devices} devices; set them to a multiple of {devices}"
        )
    fewest = -(-windows // micro_batch_size)
    parts = next(number for number in range(fewest, windows + 1) if windows % number == 0)
    return parts, windows // parts


def _require_memory(**sizes: int) -> None:
    """Raise InputError for sizes of a batch that no memory holds."""
    if (tokens := prod(sizes.values())) > MOST_BATCH_TOKENS:
        product = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(
            f"data.{product} is a batch of {tokens} tokens, which is made in memory; set them to "
            f"at most {MOST_BATCH_TOKENS} together"
        )
