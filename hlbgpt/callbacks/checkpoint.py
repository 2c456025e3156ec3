"""The run's checkpoint."""

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from hlbgpt.folders import last_checkpoint, run_folder


class LastCheckpoint(Checkpoint):
    """Keeps `checkpoints/last.ckpt` in the run's folder: the state to resume or generate from.

    The time it takes between validations counts as training, as it would for a user who waits.
    Add Lightning's ModelCheckpoint for more, such as the best of several validations.

    Args:
        after_validation: Whether to save after each validation; it is always saved at the end.
    """

    def __init__(self, after_validation: bool = True) -> None:
        self.after_validation = after_validation
        self._saved_at = -1

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A validation that stops the run is followed by the end of training.
        if self.after_validation and not trainer.sanity_checking and not trainer.should_stop:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        folder = run_folder(trainer)
        if folder and trainer.state.fn == "fit" and self._saved_at != trainer.global_step:
            # With the optimizer's state.
            trainer.save_checkpoint(last_checkpoint(folder), weights_only=False)
            self._saved_at = trainer.global_step
