"""The run's checkpoint: kept at every validation, at the end, and when the run is told to stop."""

import math
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch.nn.utils import get_total_norm

from hlbgpt.runs.folder import last_checkpoint, run_folder
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.errors import DivergedError


class Interrupted(SystemExit):
    """A signal stopped the run after its state was saved; the exit code is 128 + its number."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class LastCheckpoint(Checkpoint):
    """Keeps `checkpoints/last.ckpt` in the run's folder: the state to resume or generate from.

    SIGTERM and SIGINT (Ctrl-C), and on SLURM the signal that announces the end of the job, let the
    run finish its step, save and stop; a validation under way is broken off, and made anew after a
    resume. A second signal stops the run at once.

    The time it takes between validations counts as training, as it would for a user who waits.
    Add Lightning's ModelCheckpoint for more, such as the best of several validations.

    Args:
        after_validation: Whether to save after each validation; it is always saved at the end.
    """

    def __init__(self, after_validation: bool = True) -> None:
        self.after_validation = after_validation
        self._saved_at = -1
        self._signal: int | None = None
        self._earlier: dict[int, Any] = {}  # handlers that stood before ours

    # --- saving -------------------------------------------------------------------------------

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A validation that stops the run is followed by the end of training.
        if self.after_validation and not trainer.sanity_checking and not trainer.should_stop:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        folder = run_folder(trainer)
        if folder and trainer.state.fn == "fit" and self._saved_at != trainer.global_step:
            self._require_finite_weights(trainer, folder)
            # With the optimizer's state.
            trainer.save_checkpoint(last_checkpoint(folder), weights_only=False)
            self._saved_at = trainer.global_step  # with its validation, if one was due

    def _require_finite_weights(self, trainer: L.Trainer, folder: Path) -> None:
        """Weights that are no numbers never replace good ones, whoever asks for them to be kept."""
        norm = get_total_norm(trainer.lightning_module.parameters())
        if not math.isfinite(float(norm)):
            path = last_checkpoint(folder)
            kept = f"{path} still holds good ones" if path.is_file() else "nothing was saved"
            raise DivergedError(
                f"diverged: weights are not finite at step {trainer.global_step}; {kept}; lower "
                "the learning rate"
            )

    # --- signals ------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._take_signals(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._take_signals(trainer)

    def _take_signals(self, trainer: L.Trainer) -> None:
        """Stand in for Lightning's handlers, which act in the middle of a step, until it ends."""
        if self._earlier or threading.current_thread() is not threading.main_thread():
            return
        taken = [signal.SIGTERM, signal.SIGINT]
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            taken.append(environment.requeue_signal or signal.SIGUSR1)
        self._signal = None
        self._earlier = {
            signum: signal.signal(signum, self._on_signal)
            for signum in taken
            if signal.getsignal(signum) != signal.SIG_IGN  # as `nohup` asks for
        }

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._signal is not None and self._signal == signum:
            raise Interrupted(signum)
        self._signal = self._signal or signum

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LanguageModule)
        # Between two steps, after all that belongs to the one before: logs and validation too.
        if pl_module.steps.begins_step(batch_idx):
            self._stop_if_told(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any
    ) -> None:
        # The validation that ends a run is finished, and the run with it.
        if trainer.state.fn == "fit" and not 0 < trainer.max_steps <= trainer.global_step:
            self._stop_if_told(trainer, pl_module)

    def _stop_if_told(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The ranks stop together; each may have got the signal or not.
        if not trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False):
            return
        signum = self._signal or signal.SIGTERM
        name = signal.Signals(signum).name
        folder = run_folder(trainer)
        if trainer.sanity_checking or folder is None:
            pl_module.print(f"stopped by {name} before the first step")
        else:
            self._save(trainer)
            pl_module.print(
                f"stopped by {name} after step {trainer.global_step}; go on with: "
                f"hlbgpt fit --ckpt_path {last_checkpoint(folder)}"
            )
            if signum not in (signal.SIGTERM, signal.SIGINT):
                self._earlier[signum](signum, None)  # Lightning's: puts the job into SLURM's queue
        raise Interrupted(signum)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._earlier = {}  # Lightning puts the old handlers back

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._earlier = {}
