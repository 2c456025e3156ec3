"""Checks of settings that Lightning or the parser would take without a word, or trip over."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from hlbgpt.utils.errors import InputError

# Lowest value of each, and one below it that has a meaning of its own.
_TRAINER_LIMITS: dict[str, tuple[float, int | None]] = {
    "max_steps": (1, -1),
    "max_epochs": (1, -1),
    "log_every_n_steps": (1, None),
    "accumulate_grad_batches": (1, None),
    "check_val_every_n_epoch": (1, None),
    "num_sanity_val_steps": (0, -1),
}


def check_trainer_settings(trainer: Any, *, this_machine: bool = True) -> None:
    """Raise InputError for settings of the trainer with which no run can be made.

    Args:
        trainer: The settings.
        this_machine: Whether the run is made here, and not just planned.
    """
    for key, (lowest, special) in _TRAINER_LIMITS.items():
        value = getattr(trainer, key)
        if value is not None and value < lowest and value != special:
            also = "" if special is None else f", or {special} for no limit"
            raise InputError(f"trainer.{key}: {value} is less than {lowest}; set it higher{also}")
    for key in ("val_check_interval", "limit_train_batches"):
        if (value := getattr(trainer, key)) == 0:
            raise InputError(f"trainer.{key}: {value} is too little; set it above 0")
    if not this_machine:
        return
    if trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise InputError(
            f"trainer.accelerator: {trainer.accelerator!r} asked for, but torch "
            f"{torch.__version__} finds no CUDA GPU; use --trainer.accelerator cpu, or install a "
            "CUDA build of torch and its driver"
        )
    if trainer.accelerator == "mps" and not torch.backends.mps.is_available():
        raise InputError(
            f"trainer.accelerator: 'mps' asked for, but torch {torch.__version__} finds no Apple "
            "GPU; use --trainer.accelerator cpu"
        )
    if trainer.default_root_dir is not None:
        _require_folder("trainer.default_root_dir", Path(trainer.default_root_dir))


def _require_folder(key: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{key}: cannot make {str(folder)!r}: {error.strerror}; name a folder that can be "
            "written to"
        ) from error


def require_readable_configs(arguments: Sequence[str]) -> None:
    """Raise InputError, with the file's name, for a `--config` that is no YAML mapping."""
    for word, after in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = word.partition("=")
        path = Path(value or after)
        if name not in ("--config", "-c") or not path.is_file():  # the parser has words for that
            continue
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(
                f"--config {path}: not UTF-8 text at byte {error.start}; is it a config file?"
            ) from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            problem = getattr(error, "problem", None) or error
            raise InputError(f"--config {path}: no YAML{where}: {problem}; mend it") from error
        if not isinstance(settings, dict):
            raise InputError(
                f"--config {path}: holds no settings but {settings!r:.60}; write some as in the "
                "files of configs/"
            )
