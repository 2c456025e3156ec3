"""Checks of settings that Lightning or the parser would take without a word, or trip over."""

from pathlib import Path
from typing import Any

import torch

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
    if trainer.barebones:
        raise InputError(
            "trainer.barebones: it logs no metrics, so that no target could be met; for a run with "
            "little besides the steps, set trainer.logger to false, checkpoint and console to null"
        )
    if isinstance(trainer.strategy, str):
        _require_possible_strategy(trainer.strategy)
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


def _require_possible_strategy(name: str) -> None:
    """Raise InputError for a name of which Lightning would make a strategy that cannot be used."""
    if name.startswith("ddp_spawn"):
        raise InputError(
            f"trainer.strategy: {name!r} would send a run that is already built to other "
            "processes, which is not possible; use ddp"
        )
    if name.startswith(("fsdp", "deepspeed")) and name != "fsdp2":
        raise InputError(
            f"trainer.strategy: {name!r} is not supported, because its ranks would not train as "
            "one; use ddp or fsdp2, or leave it out for one device"
        )
    if "." in name:
        raise InputError(
            f"trainer.strategy: {name!r} is no name of a strategy; for a class write "
            f"--trainer.strategy '{{class_path: {name}}}'"
        )


def require_run_name(name: str | None) -> None:
    """Raise InputError for a name that is no name of one folder."""
    if name is not None and (name.strip(" .") == "" or {"/", "\\", "\0"} & set(name)):
        raise InputError(
            f"run_name: {name!r} is no name of a folder; use letters, digits, - and _, and "
            "trainer.default_root_dir for a path"
        )


def _require_folder(key: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{key}: cannot make {str(folder)!r}: {error.strerror}; name a folder that can be "
            "written to"
        ) from error
