"""Checkpoints on disk: written atomically, read as data only."""

import io
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from hlbgpt.runs.checkpoint_schema import RESTORED, check_checkpoint, require_entries
from hlbgpt.runs.config import CONFIG_KEY
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import atomic_write

# What torch.load may raise for files that are no checkpoints, besides UnpicklingError.
_LOAD_ERRORS = (AttributeError, EOFError, KeyError, RuntimeError, TypeError, ValueError)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically and read with `weights_only=True`.

    A machine that stops at any moment leaves the previous checkpoint or the new one. (Lightning
    itself writes to the system's temporary folder and moves the file, which may be a copy.)
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Raises InputError if the disk is full or cannot be written to, and for a checkpoint that
        could not be read again because it holds more than tensors and plain data.
        """
        if "://" in str(path):  # remote storage, which fsspec writes to
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                with temporary.open("wb") as file:
                    _save(checkpoint, file)
                if unreadable := get_unsafe_globals_in_checkpoint(temporary):
                    raise _unreadable_error(checkpoint, unreadable)
        except OSError as error:
            kept = "the previous checkpoint is kept; " if path.is_file() else ""
            raise InputError(
                f"cannot write the checkpoint {path}: {error.strerror or error}; {kept}free some "
                "space or make the folder writable, and resume"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint to the CPU; raises InputError as `load_checkpoint` does."""
        if "://" in str(path):
            checkpoint = super().load_checkpoint(path, map_location, weights_only=True)
            check_checkpoint(checkpoint, f"ckpt_path: {str(path)!r}")
        else:
            checkpoint = load_checkpoint(path)
        require_entries(checkpoint, RESTORED, f"ckpt_path: {str(path)!r}")
        return checkpoint


def _save(checkpoint: dict[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        # torch's zip writer replaces the error of a failed write with one of its own.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def require_readable_states(states: Iterable[tuple[str, Any]]) -> None:
    """Raise InputError for the first state that a checkpoint could not be read with.

    Args:
        states: Names of callbacks, each with what its `state_dict` returns.
    """
    for name, state in states:
        try:
            torch.save(state, buffer := io.BytesIO())
            buffer.seek(0)
            unreadable = ", ".join(sorted(get_unsafe_globals_in_checkpoint(buffer)))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            unreadable = f"what cannot be saved ({error})"
        if unreadable:
            raise InputError(
                f"callback {name}: its state holds {unreadable}, with which no checkpoint could be "
                "read again; let its state_dict return tensors, numbers, text, lists and dicts only"
            )


def _unreadable_error(checkpoint: dict[str, Any], unreadable: list[str]) -> InputError:
    try:
        require_readable_states(checkpoint.get("callbacks", {}).items())
    except InputError as error:
        return error
    return InputError(
        f"checkpoint: it holds {', '.join(unreadable)}, with which it could not be read again; "
        "put only tensors, numbers, text, lists and dicts into it (on_save_checkpoint)"
    )


def load_checkpoint(path: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """Read a checkpoint to the CPU as tensors and plain data; code in the file is not run.

    Args:
        path: The file.
        verify: Whether to read all of the file and check it. Without, its tensors are read when
            they are used, for those who want something else.

    Raises:
        InputError: The file cannot be read, is no checkpoint, is incomplete or damaged, or
            contains code.
    """
    name = f"ckpt_path: {str(path)!r}"
    try:
        with zipfile.ZipFile(path) as archive:
            if any(file.compress_type != zipfile.ZIP_STORED for file in archive.infolist()):
                raise zipfile.BadZipFile("compressed, which torch does not do")
            damaged = archive.testzip() if verify else None  # torch.load checks no checksums
        checkpoint = None
        if not damaged:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=not verify)
    except OSError as error:
        raise InputError(f"ckpt_path: cannot read {str(path)!r}: {error.strerror}") from error
    except (*_LOAD_ERRORS, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{name} is incomplete, is no checkpoint, or contains code; use a .ckpt file that "
            "`fit` wrote"
        ) from error
    if damaged:
        raise InputError(
            f"{name} is damaged: {damaged} does not match its checksum; use another checkpoint"
        )
    check_checkpoint(checkpoint, name)
    return checkpoint  # type: ignore[return-value]


def stored_settings(path: str | Path) -> str:
    """The settings of its run that a checkpoint holds, in YAML; InputError where it holds none."""
    text = load_checkpoint(path, verify=False).get(CONFIG_KEY)
    if not text:
        raise InputError(
            f"ckpt_path: {str(path)!r} holds no settings of its run; add --config with them"
        )
    return str(text)


def require_matching_weights(module: nn.Module, checkpoint: dict[str, Any], name: str) -> None:
    """Raise InputError unless the checkpoint called `name` has the weights of this module."""
    if problem := other_weights(module, checkpoint["state_dict"]):
        raise InputError(
            f"ckpt_path: {name} is of another network: {problem}; use the config of the "
            "checkpoint's run"
        )


def other_weights(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> str | None:
    """The first of `weights` that is not one of this module, and how it differs; None if all are.

    Weights may have another precision than the module, but integers are no fractions.
    """
    own = module.state_dict()
    for key in sorted(weights.keys() | own.keys()):
        stored, expected = weights.get(key), own.get(key)
        if stored is None or expected is None or stored.shape != expected.shape:
            found = [_shape(stored), _shape(expected)]
        elif stored.dtype != expected.dtype and not (
            stored.is_floating_point() and expected.is_floating_point()
        ):
            found = [str(tensor.dtype).removeprefix("torch.") for tensor in (stored, expected)]
        else:
            continue
        return f"{key} is {found[0]} in the checkpoint and {found[1]} in the network"
    return None


def _shape(tensor: torch.Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
