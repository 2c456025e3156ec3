"""The run's checkpoint: saved every few minutes, at the end, and when a signal stops the run."""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from hlbgpt.callbacks.signals import Signals
from hlbgpt.callbacks.vote import Vote
from hlbgpt.runs.checkpoint_io import require_readable_states
from hlbgpt.runs.folder import last_checkpoint, occupy, run_folder
from hlbgpt.runs.trust import trust_flag
from hlbgpt.training.checks import callbacks_of
from hlbgpt.training.module import LanguageModule
from hlbgpt.training.step_metrics import total_norm
from hlbgpt.utils.clock import synchronize
from hlbgpt.utils.command import Interrupted, stopped_by
from hlbgpt.utils.errors import DivergedError, InputError


class LastCheckpoint(Checkpoint):
    """Keeps `checkpoints/last.ckpt` in the run's folder: the state to resume or generate from.

    A checkpoint is saved at the end of training, and on the way after the first step that ends
    `every_minutes` or more after the last one. So a run that is killed loses a few minutes. While
    a checkpoint is saved the training clock stands still; the record states the time that saving
    took.

    SIGTERM, SIGINT (Ctrl-C), SIGHUP (a closed terminal) and, on SLURM, the signal that announces
    the end of the job let the run finish its step, and the validation after it, then save and stop.
    A second one of the same kind stops the run at once, unless it is SIGHUP. On several devices it
    is enough that one process gets the signal; all stop after the same step, within seconds.

    Training resumes exactly from these checkpoints because they are saved where Lightning's state
    is consistent: after a step without a validation, or after the validation. Add Lightning's
    `ModelCheckpoint` for more, such as the best of several validations.

    Args:
        every_minutes: Minutes between two checkpoints.

    Attributes:
        saved_step: Step of the last checkpoint that this process saved; -1 before the first.
    """

    def __init__(self, every_minutes: float = 5.0) -> None:
        if not every_minutes > 0:
            raise InputError(
                f"checkpoint.every_minutes: {every_minutes} is not above 0; set it to a number of "
                "minutes, such as 5"
            )
        self.every_minutes = every_minutes
        self.saved_step, self._saved_at = -1, 0.0
        self._signals, self._vote = Signals(), Vote()

    # --- checks before training -----------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise InputError where checkpoints would be of no use, or would replace another run's."""
        occupy(trainer)
        if (folder := run_folder(trainer)) is None:
            return
        callbacks = callbacks_of(trainer)
        for callback in callbacks:
            with contextlib.suppress(AttributeError):  # not there yet; checked when it is saved
                require_readable_states([(type(callback).__name__, callback.state_dict())])
        own = last_checkpoint(folder).resolve()
        for callback in callbacks:
            if not isinstance(callback, ModelCheckpoint) or not callback.save_last:
                continue
            name = f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
            if Path(callback.dirpath or folder, name).resolve() == own:
                raise InputError(
                    "trainer.callbacks: ModelCheckpoint save_last: every run saves last.ckpt "
                    "already, to resume from; leave save_last out, or set its dirpath"
                )

    # --- saving -------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_at = time.monotonic()
        self._signals.catch(trainer)
        self._vote.begin(trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, LanguageModule)
        followed_by_validation = pl_module.validation_due or trainer.should_stop
        if followed_by_validation or not pl_module.ends_step:
            return
        if self._vote.is_due(trainer.global_step):
            self._save_or_stop(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.should_stop:
            self._save_or_stop(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The last one; callbacks that average weights replace them for good in `on_train_end`."""
        assert isinstance(pl_module, LanguageModule)
        if self.saved_step != trainer.global_step:
            self._save(trainer, pl_module)

    on_train_end = on_train_epoch_end  # without a step there is no end of an epoch

    def _save_or_stop(self, trainer: L.Trainer, module: LanguageModule) -> None:
        due = time.monotonic() - self._saved_at >= 60 * self.every_minutes
        # The ranks decide together: their clocks differ, and only one may have got the signal.
        signum, saves = self._vote.largest(step := trainer.global_step, self._signum, due)
        if not (signum or saves):
            return
        self._save(trainer, module)
        (signum,) = self._vote.largest(step, signum or self._signum)  # it may have come meanwhile
        if signum:
            self._stop(trainer, module, signum)

    @property
    def _signum(self) -> int:
        """The signal that this process has got, or 0."""
        return self._signals.received or 0

    def _save(self, trainer: L.Trainer, module: LanguageModule) -> None:
        if (folder := run_folder(trainer)) is None:
            return
        if running := module.clock.running:
            synchronize(module.device)
            module.clock.stop()
        module.checkpoint_clock.start()
        self._require_finite_weights(trainer, folder)
        trainer.save_checkpoint(last_checkpoint(folder), weights_only=False)
        module.checkpoint_clock.stop()
        if running:
            module.clock.start()
        module.throughput.restart()
        self.saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def _require_finite_weights(self, trainer: L.Trainer, folder: Path) -> None:
        """Weights that are not finite never replace good ones."""
        norm = total_norm(list(trainer.lightning_module.parameters()))
        if not math.isfinite(float(norm)):
            path = last_checkpoint(folder)
            kept = f"{path} still holds good ones" if path.is_file() else "nothing was saved"
            raise DivergedError(
                f"diverged: weights are not finite at step {trainer.global_step}; {kept}; lower "
                "the learning rate"
            )

    # --- signals ------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._signals.catch(trainer)
        self._vote.begin(trainer.global_step)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any
    ) -> None:
        if trainer.sanity_checking and trainer.world_size == 1 and self._signum:
            self._stop(trainer, pl_module, self._signum)  # nothing to be saved yet

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (signum,) = self._vote.largest(trainer.global_step, self._signum)
        if signum:
            self._stop(trainer, pl_module, signum)

    def _stop(self, trainer: L.Trainer, pl_module: L.LightningModule, signum: int) -> None:
        stopped, folder = stopped_by(signum), run_folder(trainer)
        if trainer.sanity_checking or folder is None:
            pl_module.print(f"{stopped} before the first step")
        else:
            pl_module.print(
                f"{stopped} after step {trainer.global_step}; resume with: "
                f"hlbgpt fit --ckpt_path {last_checkpoint(folder)}{trust_flag(folder)}"
            )
            self._signals.requeue(trainer, folder, signum)
        raise Interrupted(signum, told=True)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._signals.release()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._signals.release()
