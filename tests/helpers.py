"""A small network, its data and a trainer, without the command line."""

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiktoken
import tiktoken_ext.openai_public
import torch
from lightning.pytorch.callbacks import Checkpoint

from hlbgpt.callbacks import LastCheckpoint
from hlbgpt.data import TextFiles, TextSource, TokenDataModule
from hlbgpt.data.prepare import Part, prepare_token_files
from hlbgpt.data.token_file import TokenFile
from hlbgpt.data.tokenizer import Tokenizer
from hlbgpt.models import GPT, Network
from hlbgpt.runs import RunLogger
from hlbgpt.training.module import LanguageModule


def prepare_token_file(
    path: Path, source: TextSource, split: str, tokenizer: Callable[[], Tokenizer]
) -> TokenFile:
    """The token file of a text that is one part."""
    prepare_token_files([Part(path, source)], split, tokenizer)
    return TokenFile(path)


def small_gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(vocab_size=256, max_sequence_length=32, width=16, num_heads=2, num_blocks=2)


def make(
    folder: Path,
    cache: Path,
    *,
    net: Network | None = None,
    optimizer: Any = None,
    lr_scheduler: Any = None,
    **data: Any,
) -> tuple[LanguageModule, TokenDataModule]:
    """A module with SGD that learns nothing, if no optimizer is given, and its datamodule."""
    optimizer = optimizer or (lambda groups: torch.optim.SGD(groups, lr=0.0))
    module = LanguageModule(net or small_gpt(), optimizer, lr_scheduler, compile=False)
    sizes = {"sequence_length": 32, "micro_batch_size": 4, "eval_sequence_length": 32}
    source = TextFiles(folder=str(folder))
    return module, TokenDataModule(source, "bytes", cache_dir=str(cache), **(sizes | data))


def trainer(tmp_path: Path, **arguments: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "max_epochs": -1,
        "default_root_dir": tmp_path,
    }
    if any(isinstance(callback, Checkpoint) for callback in arguments.get("callbacks", [])):
        del defaults["enable_checkpointing"]
    return L.Trainer(**(defaults | arguments))


def small_ranks(*_: Any, **__: Any) -> dict[bytes, int]:
    """A vocabulary for any encoding of tiktoken: all bytes, pairs of some, and a few longer."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    merges = [bytes(pair) for pair in itertools.product(b" \n\r\tabtheLls1'./!", repeat=2)]
    for merge in [*merges, b" \n\n", b"  \n", b" the", b"the", b"'ll", "é".encode()]:
        ranks.setdefault(merge, len(ranks))
    return ranks


def synthetic_encoding(name: str) -> tiktoken.Encoding:
    """The encoding `name` with its pattern and special tokens, but a small vocabulary."""
    public = tiktoken_ext.openai_public
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(public, "load_tiktoken_bpe", small_ranks)
        patch.setattr(public, "data_gym_to_mergeable_bpe_ranks", small_ranks)
        arguments = public.ENCODING_CONSTRUCTORS[name]()
    arguments.pop("explicit_n_vocab", None)
    return tiktoken.Encoding(**arguments)


def sgd(lr: float) -> Any:
    return lambda groups: torch.optim.SGD(groups, lr=lr)


def fit(
    folder: Path, tmp_path: Path, *callbacks: L.Callback, lr: float = 0.5, **arguments: Any
) -> tuple[L.Trainer, LanguageModule]:
    """Train the small network for 8 steps, with a validation every 2 steps."""
    data = {name: arguments.pop(name) for name in ("micro_batches",) if name in arguments}
    module, datamodule = make(folder, tmp_path, optimizer=sgd(lr), eval_batch_size=64, **data)
    arguments = {
        "max_steps": 8,
        "limit_val_batches": 1.0,
        "val_check_interval": 2,
        "num_sanity_val_steps": 1,
        "callbacks": list(callbacks),
    } | arguments
    ckpt_path = arguments.pop("ckpt_path", None)
    run = trainer(tmp_path, **arguments)
    run.fit(module, datamodule, ckpt_path=ckpt_path)
    return run, module


class SaveAfter(LastCheckpoint):
    """A `LastCheckpoint` that saves after some steps, whatever the time."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.steps = steps

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.every_minutes = 1e-9 if trainer.global_step + 1 in self.steps else 1e9


class At(L.Callback):
    """Looks at something in a hook, and keeps what it found each time."""

    def __init__(self, hook: str, look: Callable[..., Any]) -> None:
        self.found: list[Any] = []
        setattr(self, hook, lambda *arguments: self.found.append(look(*arguments)))


def error(ours: torch.Tensor, exact: torch.Tensor, least: float = 0.0) -> float:
    """Norm of the difference, as a part of the norm of `exact`, or of `least` if that is more."""
    ours, exact = ours.detach().cpu().double(), exact.detach().cpu().double()
    size = max(exact.norm().item(), least)
    assert size > 0, "nothing to compare with"
    return (ours - exact).norm().item() / size


def names(folder: Path) -> list[str]:
    """Names of the files in a folder but that of its lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def number_events(folder: Path) -> None:
    """Name event files in their order, which TensorBoard takes from their names.

    Runs of one process within a second are told apart by a counter that sorts 10 before 9.
    """
    files = sorted(folder.glob("events*"), key=lambda f: f.stat().st_mtime_ns)
    for number, file in enumerate(files):
        file.rename(folder / f"events.out.tfevents.0{number:03}")


def open_logger(folder: Path, step: int = 0, tokens: int = 0) -> RunLogger:
    """The logger of a run in `folder`, which continues after `step` steps, if any."""
    number_events(folder)
    logger = RunLogger()
    logger.open_in(folder, step, tokens)
    return logger


def read_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


def forked(main: Callable[[list[str]], int | None], words: list[str], log: Path) -> int:
    """Run a command line in a fork of this process and add what it prints to `log`.

    Returns the exit code. Unlike a new process, a fork need not import torch.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            file = os.open(log, os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            sys.argv = ["hlbgpt"]
            code = main(words) or 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
