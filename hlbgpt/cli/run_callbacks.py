"""The callbacks that every run has unless its config says otherwise, each under a key."""

import sys
from collections.abc import Sequence
from typing import Any

import lightning as L
from docstring_parser import parse
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser

from hlbgpt.callbacks import Console, LastCheckpoint, StopOnDivergence, TimeToTarget, TokenSchedule
from hlbgpt.utils.errors import InputError

# Key, class, and the class of what may replace it. Their order is that of their hooks: what is
# divergent is neither recorded nor saved.
_CALLBACKS: tuple[tuple[str, type[L.Callback], type[L.Callback]], ...] = (
    ("divergence", StopOnDivergence, StopOnDivergence),
    ("schedule", TokenSchedule, TokenSchedule),
    ("time_to_target", TimeToTarget, TimeToTarget),
    ("checkpoint", LastCheckpoint, LastCheckpoint),
    ("console", Console, ProgressBar),
)


def add_run_callbacks(parser: LightningArgumentParser) -> None:
    """Add a key for each: its settings, the class that replaces it, or null to leave it out."""
    for key, default, base in _CALLBACKS:
        parser.callback_keys.append(key)  # as `add_lightning_class_args`, which has no `help`
        parser.add_subclass_arguments(
            base, key, fail_untyped=False, required=False, help=_help(key, default)
        )
        parser.set_defaults({key: {"class_path": f"hlbgpt.callbacks.{default.__name__}"}})


def _help(key: str, default: type[L.Callback]) -> str:
    """The settings of the callback that a run has, from its docstring."""
    explained = parse(default.__doc__ or "").params
    settings = [f".{p.arg_name}: {' '.join((p.description or '').split())}" for p in explained]
    return " ".join([f"Settings, another class, or null for none. --{key}...", *settings])


def as_list(callbacks: Any) -> list[Any]:
    """One callback or logger, several or none as a list."""
    if callbacks is None or callbacks is False:
        return []
    return list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]


def require_no_second(callbacks: Sequence[L.Callback], given: dict[str, Any]) -> None:
    """Raise InputError where a callback does what one of those under a key does already.

    Args:
        callbacks: Those of `trainer.callbacks`.
        given: The callback under each key; None where it was left out.
    """
    for key, _, base in _CALLBACKS:
        found = [callback for callback in callbacks if isinstance(callback, base)]
        if base is ProgressBar or len(found) + (given.get(key) is not None) < 2:
            continue
        kind = type(found[-1])
        also = "; for a target that does not stop the run use hlbgpt.callbacks.Milestone"
        raise InputError(
            f"trainer.callbacks: {kind.__name__} is a second {base.__name__}; take it out and set "
            f"--{key} {kind.__module__}.{kind.__name__}, or set {key} to null"
            + (also if base is TimeToTarget else "")
        )


def without_unused(given: dict[str, L.Callback], trainer: Any, command: str) -> dict[str, Any]:
    """Take out of `given`, callbacks by their keys, those that the command does not use.

    Returns what follows from that for the settings of the trainer, which would otherwise get a
    progress bar and a checkpoint callback of Lightning's.
    """
    changed: dict[str, Any] = {}
    if trainer.enable_checkpointing is False:
        given.pop("checkpoint", None)
    elif "checkpoint" not in given and not _has(trainer.callbacks, Checkpoint):
        changed["enable_checkpointing"] = False
    own_bar = _has(trainer.callbacks, ProgressBar)
    if own_bar or trainer.enable_progress_bar is False or command != "fit":
        given.pop("console", None)
    if "console" not in given and trainer.enable_progress_bar is None:
        # Not between the texts that `predict` prints.
        shown = command in ("validate", "test") and sys.stdout.isatty()
        changed["enable_progress_bar"] = own_bar or shown
    return changed


def _has(callbacks: Sequence[Any], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)
