"""Where a run's files go."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import lightning as L

from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import locked

RUNS = Path("runs")
RECORD, CONFIG = "record.json", "config.yaml"
_SLURM_JOB = "slurm_job"
_CLAIMED = "HLBGPT_RUN_FOLDER"  # environment variable, for the ranks that Lightning launches


def run_folder(trainer: L.Trainer) -> Path | None:
    """The folder of the run that `trainer` fits; None for a `fast_dev_run`, which keeps nothing.

    The ranks agree on it, so all of them must ask.
    """
    if getattr(trainer, "fast_dev_run", False) or trainer.log_dir is None:
        return None
    return Path(trainer.log_dir)


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint kept in a run's folder."""
    return folder / "checkpoints" / "last.ckpt"


def folder_of(checkpoint: str | Path) -> Path:
    """The folder of the run that wrote `checkpoint`, if it lies where runs keep theirs."""
    path = Path(checkpoint)
    return path.parents[1] if len(path.parts) > 2 else path.absolute().parents[1]


def newest_checkpoint(config_name: str | None) -> Path:
    """The last.ckpt written last, of the runs of a config, or of all runs if None.

    Raises InputError where there is none.
    """
    where = RUNS / (config_name or "*") / "version_*"
    found = list(Path().glob(str(last_checkpoint(where))))
    if not found:
        raise InputError(
            f"ckpt_path: 'last' asked for, but no checkpoint is at {last_checkpoint(where)}; name "
            "a checkpoint (.ckpt), or leave --ckpt_path out to start a new run"
        )
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def is_unfinished(checkpoint: str | Path) -> bool:
    """Whether `checkpoint` is the last of a run in a folder of ours that was cut short."""
    folder = folder_of(checkpoint)
    return (
        last_checkpoint(folder).absolute() == Path(checkpoint).absolute()
        and Path(checkpoint).is_file()
        and (folder / CONFIG).is_file()
        and not (folder / RECORD).exists()
        and folder.name.startswith("version_")
    )


def requeued_checkpoint(config_name: str) -> str | None:
    """Where this SLURM job, put back into the queue, left off; None if it is new or no job."""
    if not int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        return None
    for marker in (RUNS / config_name).glob(f"version_*/{_SLURM_JOB}"):
        checkpoint = last_checkpoint(marker.parent)
        if marker.read_text() == os.environ["SLURM_JOB_ID"] and is_unfinished(checkpoint):
            return str(checkpoint)
    return None


def claim_folder(parent: Path) -> Path:
    """Make the first version_N in `parent` that is not there yet; made by one process only.

    Ranks that Lightning launches later find the folder that the first one made.
    """
    if claimed := _claimed_by_launcher():
        return claimed
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
            if job := os.environ.get("SLURM_JOB_ID"):
                (folder / _SLURM_JOB).write_text(job)
            return reclaim_folder(folder)


def reclaim_folder(folder: Path) -> Path:
    """Go on in a folder that is there."""
    os.environ[_CLAIMED] = str(folder)
    return folder


def _claimed_by_launcher() -> Path | None:
    claimed = os.environ.get(_CLAIMED)
    return Path(claimed) if claimed and "LOCAL_RANK" in os.environ else None


def forget_claim() -> None:
    """Let what was claimed be: by an earlier run of this process, or now that training starts."""
    if "LOCAL_RANK" not in os.environ:
        os.environ.pop(_CLAIMED, None)


def drop_folder_without_steps() -> None:
    """Remove the folder that is still claimed, for its run ended before it trained."""
    folder = Path(os.environ.get(_CLAIMED, ""))
    if folder.name and "LOCAL_RANK" not in os.environ and not (folder / "checkpoints").exists():
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other runs are in it
            folder.parent.rmdir()
            folder.parents[1].rmdir()


@contextlib.contextmanager
def sole_owner(folder: Path) -> Iterator[None]:
    """Hold `folder` against other processes that would go on with the same run.

    Raises InputError if one has it. The system lets go when the process ends, however it does.
    """
    with locked(folder, wait=False) as held:
        if not held:
            raise InputError(
                f"ckpt_path: the run in {folder} is still going on in another process; wait for it "
                "or stop it first"
            )
        yield
