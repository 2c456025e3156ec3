"""A small network, its data and a trainer, without the command line."""

import itertools
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiktoken
import tiktoken_ext.openai_public
import torch
import torch.distributed as dist
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


# --- processes ------------------------------------------------------------------------------------


def fork(target: Callable[[], int | None], log: Path | None = None, **variables: str) -> int:
    """Run `target` in a fork of this process, which ends with its exit code; returns the PID.

    Unlike a new process, a fork need not import torch.

    Args:
        target: What to run.
        log: File to which it adds what it prints.
        variables: Environment variables that it has besides those of this process.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.environ |= variables
            torch.set_num_threads(1)  # threads of a pool do not survive a fork
            if log is not None:
                file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                os.dup2(file, 1)
                os.dup2(file, 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            code = target() or 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return child


def forked(main: Callable[[list[str]], int | None], words: list[str], log: Path) -> int:
    """Run a command line in a fork of this process and add what it prints to `log`.

    Returns the exit code.
    """
    return wait_for([fork(lambda: _command(main, words), log)])[0]


def _command(main: Callable[[list[str]], int | None], words: list[str]) -> int | None:
    sys.argv = ["hlbgpt"]
    return main(words)


def wait_for(processes: list[int], timeout: float = 300) -> list[int]:
    """The exit codes of child processes; kills all of them if one takes longer than `timeout`."""
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout
    while len(codes) < len(processes):
        for process in processes:
            if process not in codes and (ended := os.waitpid(process, os.WNOHANG))[0]:
                codes[process] = os.waitstatus_to_exitcode(ended[1])
        if time.monotonic() > end:
            for process in set(processes) - codes.keys():
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            raise TimeoutError(f"{len(processes) - len(codes)} processes took over {timeout} s")
        time.sleep(0.02)
    return [codes[process] for process in processes]


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launcher_variables(launcher: str, rank: int, number: int, port: int) -> dict[str, str]:
    """What `torchrun` or `slurm` would tell rank `rank` of `number` processes on this machine."""
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if launcher == "torchrun":
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
        sizes = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
        elastic = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": 0}
        return store | {key: str(value) for key, value in (ranks | sizes | elastic).items()}
    job = {"JOB_ID": 77, "JOB_NAME": "train", "NTASKS": number, "NTASKS_PER_NODE": number}
    job |= {"NNODES": 1, "NODELIST": "127.0.0.1", "NODEID": 0, "PROCID": rank, "LOCALID": rank}
    return store | {f"SLURM_{key}": str(value) for key, value in job.items()}


def start_ranks(
    main: Callable[[list[str]], int | None],
    words: list[str],
    *,
    number: int,
    launcher: str,
    log: Path,
) -> list[int]:
    """Start a command line in forks, as torchrun or SLURM would; returns the PIDs by rank.

    Rank r adds what it prints to `log`, with its suffix replaced by `.r`.
    """
    port = free_port()
    words = [*words, f"--trainer.devices={number}"]
    return [
        fork(
            lambda: _command(main, words),
            log.with_suffix(f".{rank}"),
            **launcher_variables(launcher, rank, number, port),
        )
        for rank in range(number)
    ]


def in_ranks(number: int, function: Callable[[int], Any], timeout: float = 100) -> list[Any]:
    """What `function(rank)` returns in each of `number` forks, which are a gloo process group.

    Raises AssertionError if one fails; its traceback is printed.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:

        def run(rank: int) -> None:
            where = f"tcp://127.0.0.1:{port}"
            dist.init_process_group("gloo", init_method=where, rank=rank, world_size=number)
            torch.save(function(rank), Path(folder, str(rank)))
            dist.barrier()
            dist.destroy_process_group()

        codes = wait_for([fork(partial(run, rank)) for rank in range(number)], timeout)
        assert codes == [0] * number, codes
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(number)]
