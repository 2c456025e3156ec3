"""Where a run's files go."""

from pathlib import Path

import lightning as L


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
