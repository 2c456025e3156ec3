"""Exact resume: what a checkpoint holds beyond Lightning's own state.

A run resumed from a checkpoint that `LastCheckpoint` wrote ends bit-identical, on a CPU, to one
that was never stopped. Lightning restores weights, optimizer, schedule, loops, the position of the
loader and the state of callbacks; this module adds counters and the random state.
"""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Optimizer

from hlbgpt.data import TokenDataModule
from hlbgpt.optim import MuonAdamW
from hlbgpt.optim.ranks import has_other_ranks
from hlbgpt.runs.checkpoint_schema import TRAINING, require_entries
from hlbgpt.utils.errors import InputError

KEY = "hlbgpt"  # of this project's part of a checkpoint
_FUSED = (Adam, Adagrad, SGD, MuonAdamW)  # optimizers with kernels that check no shapes


def random_states(device: torch.device) -> list[dict[str, Any]]:
    """The state of every random generator, for each rank; tensors and plain data only."""
    name, keys, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, [int(key) for key in keys], *rest),
        "device": None if device.type == "cpu" else _generator(device).get_rng_state(),
    }
    if not has_other_ranks():
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def restore_random_state(states: list[dict[str, Any]], rank: int, device: torch.device) -> None:
    """Set the generators to what `random_states` found; a rank beyond those keeps its own."""
    if rank >= len(states):
        return
    state = states[rank]
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    if state["device"] is not None and device.type != "cpu":
        _generator(device).set_rng_state(state["device"])


def _generator(device: torch.device) -> Any:
    return torch.cuda if device.type == "cuda" else torch.get_device_module(device)


def progress(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """Steps made and tokens seen when `checkpoint` was written."""
    return checkpoint["global_step"], checkpoint[KEY]["tokens_seen"]


# --- tokenizer and text ---------------------------------------------------------------------------


def text_state(data: TokenDataModule, train_texts: list[str]) -> dict[str, Any]:
    """What a checkpoint says of the text that its network knows.

    Args:
        data: The datamodule, set up for training.
        train_texts: Fingerprints of the texts trained on.
    """
    return {
        "tokenizer": data.tokenizer,
        "special_tokens": list(data.special_tokens),
        "vocab_size": data.vocab_size,
        "texts": {"train": train_texts, "validation": data.files["validation"].header.fingerprint},
    }


def train_texts(checkpoint: dict[str, Any], data: TokenDataModule) -> list[str]:
    """Fingerprints of the texts that a resumed run has trained on when it has ended."""
    earlier, now = checkpoint[KEY]["texts"]["train"], data.train_fingerprint
    return [*earlier, now] if now != earlier[-1] else earlier


def changed_texts(checkpoint: dict[str, Any], data: TokenDataModule) -> list[str]:
    """The splits whose text is another one than that of the checkpoint's run."""
    texts = checkpoint[KEY]["texts"]
    earlier = {"train": texts["train"][-1], "validation": texts["validation"]}
    now = {
        "train": data.train_fingerprint,
        "validation": data.files["validation"].header.fingerprint,
    }
    return [split for split in earlier if now[split] != earlier[split]]


def require_same_tokenizer(checkpoint: dict[str, Any], data: TokenDataModule) -> None:
    """Raise InputError for a tokenizer whose numbers mean other texts to the checkpoint's network.

    Special tokens may be added to those that it knows.
    """
    if (state := checkpoint.get(KEY)) is None:  # of a trainer that this project did not save
        return
    known, given = state["special_tokens"], list(data.special_tokens)
    if state["tokenizer"] != data.tokenizer:
        raise InputError(
            f"data.tokenizer: {data.tokenizer}, but the checkpoint's network was trained with "
            f"{state['tokenizer']}, and the numbers of its tokens mean other texts; leave it out"
        )
    if given[: len(known)] != known:
        raise InputError(
            f"data.special_tokens: {given}, but the checkpoint's network was trained with {known}; "
            "begin with those"
        )


# --- checks ---------------------------------------------------------------------------------------


def require_training_state(checkpoint: dict[str, Any]) -> None:
    """Raise InputError where `checkpoint` holds weights only."""
    if KEY not in checkpoint or "optimizer_states" not in checkpoint:
        raise InputError(
            "ckpt_path: the checkpoint holds weights only, without the state to go on training "
            "from; use one saved during `fit` (last.ckpt)"
        )
    require_entries(checkpoint, TRAINING, "ckpt_path: the checkpoint")


def require_fitting_state(optimizer: Optimizer) -> None:
    """Raise InputError where a restored state has not the shape of its parameter.

    torch's fused kernels would read and write outside of it.
    """
    if not isinstance(optimizer, _FUSED):
        return
    for param, state in optimizer.state.items():
        for name, value in state.items():
            expected = torch.Size() if name == "step" else param.shape
            if isinstance(value, Tensor) and value.shape != expected:
                raise InputError(
                    f"ckpt_path: the checkpoint's optimizer has {name} of shape "
                    f"{tuple(value.shape)} for weights of shape {tuple(param.shape)}; it is "
                    "damaged, use another"
                )


def require_steps_left(checkpoint: dict[str, Any], max_steps: int, max_tokens: int | None) -> None:
    """Raise InputError where the run of `checkpoint` has reached its end already."""
    if max_tokens is not None and max_tokens <= (seen := checkpoint[KEY]["tokens_seen"]):
        raise InputError(
            f"data.max_tokens (or the end of schedule.table): {max_tokens}, but the checkpoint has "
            f"seen {seen} already; raise it, or measure the checkpoint with `hlbgpt validate`"
        )
    if 0 <= max_steps <= (step := checkpoint["global_step"]):
        raise InputError(
            f"trainer.max_steps: {max_steps}, but the checkpoint is at step {step} already; set it "
            "above, or measure the checkpoint with `hlbgpt validate`"
        )
