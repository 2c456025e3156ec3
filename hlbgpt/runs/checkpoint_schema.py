"""What a checkpoint has to hold, checked once when it is read.

Lightning and its callbacks take what they find in a checkpoint as it is. A file that is damaged or
made to do harm would end in a traceback far from the cause, or not end at all.
"""

import random
import re
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hlbgpt.utils.errors import InputError
from hlbgpt.utils.schema import AMOUNT, COUNT, FLAG, NUMBER, TEXT, Kind, find_fault

# Entries may be shared, which lets a small file stand for a huge content.
_MAX_DEPTH, _MAX_VALUES = 50, 10_000_000


def _loads(load: Callable[[], Any]) -> bool:
    """Whether a state can be loaded into a generator of random numbers."""
    try:
        load()
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
        return False
    return True


def _is_python_state(state: Any) -> bool:
    return _loads(lambda: random.Random().setstate((state[0], tuple(state[1]), state[2])))


VALUE = Kind("a number", lambda value: type(value) is float or NUMBER.accepts(value))
PAIR = Kind(
    "a pair of numbers",
    lambda value: (
        isinstance(value, (list, tuple)) and len(value) == 2 and all(map(VALUE.accepts, value))
    ),
)
VERSION = Kind(
    "a version", lambda value: isinstance(value, str) and bool(re.match(r"\d+(\.\d+)+\S*$", value))
)
TENSORS = Kind(
    "a dict of tensors with names",
    lambda value: (
        isinstance(value, dict)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    ),
)
STATE = Kind("a dict", lambda value: isinstance(value, dict))
DEVICE_STATE = Kind("a tensor or None", lambda value: value is None or isinstance(value, Tensor))
TORCH_STATE = Kind(
    "a state of torch's random numbers",
    lambda value: _loads(lambda: torch.Generator().set_state(value)),
)
PYTHON_STATE = Kind("a state of Python's random numbers", _is_python_state)
NUMPY_STATE = Kind(
    "a state of NumPy's random numbers",
    lambda value: _loads(lambda: np.random.RandomState().set_state(tuple(value))),
)
PROGRESS = Kind("a dict of counts", lambda value: isinstance(value, dict) and _is_progress(value))


def _is_progress(value: Any) -> bool:
    """Whether a value is that of a loop's progress, whatever its parts are called."""
    if isinstance(value, dict):
        return all(map(_is_progress, value.values()))
    if isinstance(value, list):  # of loaders
        return all(isinstance(item, dict) and _is_progress(item) for item in value)
    return FLAG.accepts(value) or COUNT.accepts(value)


# Add what is read from a checkpoint here: what `LanguageModule.on_save_checkpoint` writes, and the
# states of callbacks.
_OWN = {
    "tokens_seen": COUNT,
    "batch_tokens": COUNT,
    "flops": AMOUNT,
    "validated": FLAG,
    "tokenizer": TEXT,
    "special_tokens": [TEXT],
    "vocab_size": COUNT,
    "texts": {"train": [TEXT], "validation": TEXT},
    "random": [
        {
            "torch": TORCH_STATE,
            "python": PYTHON_STATE,
            "numpy": NUMPY_STATE,
            "device": DEVICE_STATE,
        }
    ],
}
_MEASURED = {
    "monitor": TEXT,
    "value": VALUE,
    "step": COUNT,
    "validation": {
        "tokens": COUNT,
        "split_tokens": COUNT,
        "windows": COUNT,
        "sequence_length": COUNT,
        "fingerprint": TEXT,
        "complete": FLAG,
    },
}
_CALLBACKS = {
    "TimeToTarget": {
        "train_seconds": AMOUNT,
        "data_seconds": AMOUNT,
        "validation_seconds": AMOUNT,
        "checkpoint_seconds": AMOUNT,
        "compile_seconds": AMOUNT,
        "wall_seconds": AMOUNT,
        "last_measurement": (None, _MEASURED),
        "values": [PAIR],
    },
    "Milestone": {"met": (None, _MEASURED | {"tokens": COUNT, "train_seconds": AMOUNT})},
}
_SCHEMA: dict[str, Any] = {
    "state_dict": TENSORS,
    "pytorch-lightning_version": VERSION,
    "epoch": COUNT,
    "global_step": COUNT,
    "loops": {
        "fit_loop": {
            "epoch_loop.automatic_optimization.optim_progress": PROGRESS,  # has the global step
            "epoch_loop.batch_progress": PROGRESS,
            "epoch_progress": PROGRESS,
            "state_dict": STATE,  # of the loader, which checks it
        }
    },
    "callbacks": STATE,
    "optimizer_states": [{"state": STATE, "param_groups": [{"params": [COUNT]}]}],
    "lr_schedulers": [STATE],
    "hlbgpt_config": TEXT,
    "hlbgpt": _OWN,
}
WEIGHTS = ("state_dict",)
# What Lightning reads, in any command and to train on.
RESTORED = (*WEIGHTS, "pytorch-lightning_version", "epoch", "global_step")
TRAINING = (*RESTORED, "loops", "callbacks", "optimizer_states", "lr_schedulers", "hlbgpt")


def check_checkpoint(checkpoint: Any, name: str) -> None:
    """Raise InputError, which begins with `name`, for an entry that is not what it has to be."""
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise InputError(
            f"{name} is no checkpoint of hlbgpt: it has no state_dict; use a .ckpt file that `fit` "
            "wrote"
        )
    _require_modest({key: value for key, value in checkpoint.items() if key != "state_dict"}, name)
    present = {key: kind for key, kind in _SCHEMA.items() if key in checkpoint}
    if fault := find_fault(checkpoint, present):
        raise _error(name, fault)
    for key, state in checkpoint.get("callbacks", {}).items():
        kind = str(key).partition("(")[0]  # the rest tells several of a kind apart
        if fault := find_fault(state, _CALLBACKS.get(kind, STATE), f"callbacks.{key}"):
            raise _error(name, fault)


def require_entries(checkpoint: dict[str, Any], keys: Collection[str], name: str) -> None:
    """Raise InputError for the first of the entries, out of those above, that is not there."""
    for key in keys:
        if key not in checkpoint:
            raise _error(name, f"{key} is missing")


def _error(name: str, fault: str) -> InputError:
    return InputError(
        f"{name} is damaged or no checkpoint of hlbgpt: {fault}; use another checkpoint"
    )


def _require_modest(checkpoint: dict[str, Any], name: str) -> None:
    """Raise InputError for a content that shared entries make huge, or that holds itself."""
    sizes: dict[int, tuple[int, int]] = {}  # values within, and depth

    def measure(value: Any, level: int) -> tuple[int, int]:
        if not isinstance(value, (dict, list, tuple, set)):
            return 1, 0
        if level > _MAX_DEPTH:
            return 1, _MAX_DEPTH
        if id(value) not in sizes:
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            found = [measure(part, level + 1) for part in parts]
            sizes[id(value)] = (
                1 + sum(n for n, _ in found),
                1 + max((d for _, d in found), default=0),
            )
        return sizes[id(value)]

    size, depth = measure(checkpoint, 0)
    if size > _MAX_VALUES or depth > _MAX_DEPTH:
        raise InputError(
            f"{name} is no checkpoint of hlbgpt: its entries hold more than {_MAX_VALUES} values "
            f"or are nested deeper than {_MAX_DEPTH} levels; use another checkpoint"
        )
