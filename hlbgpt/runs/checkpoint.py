"""Checkpoints on disk: written whole or not at all, read as data only."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from hlbgpt.utils.errors import InputError


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's way to write and read checkpoints, made safe.

    A checkpoint is written beside its place, flushed to the disk and renamed, so that a machine
    that stops at any moment leaves the old file or the new one. (Lightning writes to the system's
    temporary folder, from which a move may be a copy.) It is read with `weights_only=True`: a file
    that carries code is refused and its code not run.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        if "://" in str(path):  # not a local file: fsspec's business
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
            try:
                _write(checkpoint, temporary)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            _flush_folder(path.parent)
        except OSError as error:
            kept = f"; {path} still holds the one before" if path.is_file() else ""
            raise InputError(
                f"cannot write the checkpoint {path}: {error.strerror or error}{kept}; make room "
                "or make the folder writable, and resume"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return load_checkpoint(path)


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            # torch's zip writer hides the error of a write that failed behind its own.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
        file.flush()
        os.fsync(file.fileno())


def _remove_leftovers(path: Path) -> None:
    """What a process that was killed while it wrote this checkpoint left behind."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Make the renaming last; a folder can be opened on POSIX systems only."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Tensors and plain data only: a file that carries code is refused, and its code not run.

    Raises:
        InputError: `path` is no checkpoint, is not whole, was damaged, or carries code.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself compares no checksum
            if damaged := archive.testzip():
                raise InputError(
                    f"ckpt_path: {str(path)!r} is damaged: {damaged} does not match its checksum; "
                    "use another checkpoint"
                )
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        zipfile.BadZipFile,
    ) as error:
        raise InputError(
            f"ckpt_path: {str(path)!r} is no checkpoint that loads as data only: not whole, of "
            "another kind, or with code in it; name a .ckpt file that `fit` wrote"
        ) from error
    except OSError as error:
        raise InputError(f"ckpt_path: cannot read {str(path)!r}: {error.strerror}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise InputError(
            f"ckpt_path: {str(path)!r} is no checkpoint of hlbgpt: it has no state_dict"
        )
    return checkpoint


def require_matching(module: torch.nn.Module, checkpoint: dict[str, Any], name: str) -> None:
    """Raise InputError unless `checkpoint`, called `name`, holds the weights of this network."""
    theirs, ours = (
        {key: tuple(value.shape) for key, value in state.items()}
        for state in (checkpoint["state_dict"], module.state_dict())
    )
    for key in sorted(theirs.keys() | ours.keys()):
        there, here = theirs.get(key, "missing"), ours.get(key, "missing")
        if there != here:
            raise InputError(
                f"ckpt_path: {name} is of another network: {key} is {there} there and {here} "
                "here; use the config of its run"
            )
