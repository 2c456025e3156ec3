"""The command `hlbgpt fit|validate|test|predict`, and runs built from its words without it."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import lightning as L
from jsonargparse import set_parsing_settings
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from hlbgpt.callbacks import TokenSchedule
from hlbgpt.cli.lightning_cli import CLI
from hlbgpt.cli.parser import UsageError, library_error
from hlbgpt.cli.words import checked
from hlbgpt.models import Network
from hlbgpt.runs.config import config_name
from hlbgpt.runs.folder import release_claim, remove_unused_folder
from hlbgpt.runs.logger import quiet_writers
from hlbgpt.runs.ranks import forget_decisions
from hlbgpt.utils.command import is_out_of_memory, output_optional
from hlbgpt.utils.errors import DivergedError, InputError, one_line


@dataclass(frozen=True)
class Built:
    """What a config describes, without trainer and data.

    Attributes:
        name: Name of the config.
        config: The parsed settings of `fit`.
        net: The network.
        optimizer: Makes the optimizer from parameter groups.
        schedule: The token schedule; its table may be empty.
    """

    name: str
    config: Any
    net: Network
    optimizer: Callable[[Any], Optimizer]
    schedule: TokenSchedule


def build(words: Sequence[str], device: str = "cpu") -> Built:
    """Build what `hlbgpt fit` with these words would train, without training or data.

    Args:
        words: Words behind `hlbgpt fit`, such as `--config configs/speedrun.yaml`.
        device: Device of the network; on `meta` it has shapes but no memory.

    Raises:
        InputError: the words make no sense.
    """
    with one_line_errors():
        cli = _parse(["fit", *words], device=device)
    made = cli.config_init["fit"]
    schedule = made.schedule or TokenSchedule()
    name = config_name(cli.settings.get("config"))
    return Built(name, cli.settings, made.model.net, made.model.optimizer, schedule)


def run(words: Sequence[str], callbacks: Sequence[L.Callback] = ()) -> CLI:
    """Run a command, the first of `words`; this process is left as it was."""
    release_claim()
    forget_decisions()
    _silence_lightning()
    path = list(sys.path)
    try:
        cli = _parse(words, callbacks)
        with quiet_writers(), output_optional() if cli.subcommand == "fit" else nullcontext():
            cli.run()
        return cli
    except BaseException:
        remove_unused_folder()
        raise
    finally:
        sys.path[:] = path


def _parse(
    words: Sequence[str], callbacks: Sequence[L.Callback] = (), device: str | None = None
) -> CLI:
    # Classes in a file of the current folder can be named in `class_path`, as `file.Class`.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file there stands in for a library
    if words and words[0].startswith("--print_completion"):
        _offer_completion()
    return CLI(checked(words), callbacks, device)


def _offer_completion() -> None:
    """Let the parser know `--print_completion`, which it knows on request only."""
    if find_spec("shtab") is None:
        raise InputError("--print_completion: needs the package shtab; run pip install shtab")
    set_parsing_settings(add_print_completion_argument=True)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what Lightning and the parser raise for bad input into InputError."""
    try:
        yield
    except UsageError as error:
        raise InputError(error.message) from None
    except MisconfigurationException as error:
        raise InputError(one_line(error)) from error
    except (InputError, OSError, DivergedError):
        raise  # a line already
    except Exception as error:
        if is_out_of_memory(error) or (line := library_error(error)) is None:
            raise
        raise line from error


def _silence_lightning() -> None:
    """Drop Lightning's advertisements, and warnings about its own code."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    # Optimization stays as Lightning means it where a batch is one micro-batch.
    warnings.filterwarnings("ignore", message=".*`LightningModule.optimizer_.*hooks will not be.*")
    # Ours are the same on all ranks already.
    ours = r"(val|test)_(loss|perplexity|bits_per_byte|accuracy)"
    warnings.filterwarnings("ignore", message=rf".*`self.log\('{ours}', ..., sync_dist=True.*")
    # torch below 2.13 has no other name for it.
    warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_wanted)
    # Says that a signal came, which we say ourselves.
    connector = "lightning.pytorch.trainer.connectors.signal_connector"
    logging.getLogger(connector).setLevel(logging.WARNING)


def _is_wanted(entry: logging.LogRecord) -> bool:
    # The end of the steps is in our own summary, and would stand behind the progress bar.
    unwanted = ("Tip:", "`Trainer.fit` stopped: `max_steps=")
    return not any(words in entry.getMessage() for words in unwanted)


def main(words: Sequence[str]) -> None:
    """Run a command; `hlbgpt.__main__` turns what this raises into a line and an exit code."""
    with one_line_errors():
        run(words)
