"""Where a run's files go."""

import contextlib
import glob
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import lightning as L

from hlbgpt.runs.ranks import decide, is_first_process
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import locked

RUNS = Path("runs")
RECORD, CONFIG = "record.json", "config.yaml"
# Folders of trainers that were given none.
_FOLDERS: weakref.WeakKeyDictionary[L.Trainer, Path | None] = weakref.WeakKeyDictionary()
_HELD: set[Path] = set()  # folders that this process holds
_claimed: list[Path] = []  # the folder of a run that has not trained yet; at most one


def run_folder(trainer: L.Trainer) -> Path | None:
    """The folder of the run that `trainer` fits; None for a `fast_dev_run`, which keeps nothing.

    It is `trainer.default_root_dir`, which the command line sets. Where that is not set, each
    trainer gets a new folder in `runs/default`. It never depends on the logger. The ranks agree on
    it, so all of them must ask.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    root = Path(trainer.default_root_dir)
    if root != Path.cwd():
        return root
    if trainer not in _FOLDERS:
        folder = _new_folder(RUNS / "default") if trainer.is_global_zero else None
        _FOLDERS[trainer] = trainer.strategy.broadcast(folder)
    return _FOLDERS[trainer]


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint of a run's folder."""
    return folder / "checkpoints" / "last.ckpt"


def folder_of(checkpoint: str | Path) -> Path:
    """The folder of the run that wrote `checkpoint`, if it lies where runs keep theirs.

    A link outside the folder of a run stands for the checkpoint to which it leads.
    """
    path = Path(checkpoint)
    folder = path.absolute().parent.parent
    lies_in_run = last_checkpoint(folder).parent == path.absolute().parent
    if path.is_symlink() and not (lies_in_run and (folder / CONFIG).is_file()):
        path = path.resolve()
    return (path if len(path.parts) > 2 else path.absolute()).parent.parent


def newest_checkpoint(config_name: str | None) -> Path:
    """The last.ckpt written last, among the runs of a config, or among all runs if None.

    Raises InputError where there is none.
    """
    name = glob.escape(config_name) if config_name else "*"
    found = list(Path().glob(str(last_checkpoint(RUNS / name / "version_*"))))
    if not found:
        where = last_checkpoint(RUNS / (config_name or "*") / "version_*")
        raise InputError(
            f"ckpt_path: 'last' asked for, but no checkpoint is at {where}; name "
            "a checkpoint (.ckpt), or leave --ckpt_path out to start a new run"
        )
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def is_unfinished(checkpoint: str | Path) -> bool:
    """Whether `checkpoint` is the last.ckpt of a run that was cut short: one without a record."""
    folder = folder_of(checkpoint)
    return (
        last_checkpoint(folder).resolve() == Path(checkpoint).resolve()
        and Path(checkpoint).is_file()
        and (folder / CONFIG).is_file()
        and not (folder / RECORD).exists()
    )


def claim_folder(parent: Path) -> Path:
    """Make the first version_N in `parent` that does not exist; all processes of a run get it."""
    folder = decide("trainer.default_root_dir", lambda: str(_new_folder(parent)))
    return reclaim_folder(Path(folder))


def _new_folder(parent: Path) -> Path:
    """Make the first version_N in `parent` that does not exist."""
    number = 0
    while True:
        folder = parent / f"version_{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise InputError(
                f"runs: cannot make {str(folder)!r}: {error.strerror}; run from a folder that can "
                "be written to, or set --trainer.default_root_dir"
            ) from error
        else:
            return folder


def reclaim_folder(folder: Path) -> Path:
    """Continue in a folder that exists."""
    _claimed[:] = [folder]
    return folder


def require_unused(folder: Path) -> None:
    """Raise InputError if a run has ended in `folder`, or another run has trained there."""
    if (folder / RECORD).exists() or last_checkpoint(folder).exists():
        raise InputError(
            f"trainer.default_root_dir: {str(folder)!r} holds another run; name another folder"
        )


def release_claim() -> None:
    """Forget the claimed folder: its run is over, or trains now and is to be kept."""
    _claimed.clear()


def remove_unused_folder() -> None:
    """Remove the folder that is still claimed: its run ended before it trained."""
    for folder in _claimed:
        if not is_first_process() or (folder / "checkpoints").exists():
            continue
        # Renamed first: a logger's thread that still writes would make its file anew.
        doomed = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        with contextlib.suppress(FileNotFoundError):
            folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        with contextlib.suppress(OSError):  # they hold other runs
            folder.parent.rmdir()
            folder.parents[1].rmdir()


def occupy(trainer: L.Trainer) -> None:
    """Keep the folder of a run that begins from being used by another one, until its trainer goes.

    Raises InputError if the folder holds another run, unless `trainer` resumes that run from its
    last.ckpt, or if another process is training there.
    """
    if (folder := run_folder(trainer)) is None:
        return
    resumed = Path(trainer.ckpt_path).resolve() if trainer.ckpt_path else None
    if resumed != last_checkpoint(folder).resolve() or (folder / RECORD).exists():
        require_unused(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if trainer.is_global_zero and folder.resolve() not in _HELD:  # by the command line, say
        held = contextlib.ExitStack()
        held.enter_context(exclusive(folder))
        weakref.finalize(trainer, held.close)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` against other processes that would continue the same run.

    The system releases it when the process ends, however it ends. Raises InputError if another
    process holds it.
    """
    with locked(folder, wait=False) as free:
        if not free:
            raise InputError(
                f"ckpt_path: the run in {folder} is still going on in another process; wait for it "
                "or stop it first"
            )
        _HELD.add(held := folder.resolve())
        try:
            yield
        finally:
            _HELD.discard(held)
