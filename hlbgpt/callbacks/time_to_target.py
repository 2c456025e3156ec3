"""The clock: stops training when the target is met, and records how long that took."""

from typing import Any, Literal

import lightning as L

from hlbgpt.callbacks.eta import fraction_done, in_words, seconds_to_target
from hlbgpt.callbacks.last_checkpoint import LastCheckpoint
from hlbgpt.callbacks.record import log_record, make_record, summary
from hlbgpt.callbacks.target import Target
from hlbgpt.runs.folder import RECORD, occupy, run_folder
from hlbgpt.training.checks import callbacks_of
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.clock import Stopwatch, run_seconds, synchronize
from hlbgpt.utils.errors import DivergedError, InputError
from hlbgpt.utils.files import write_json


class TimeToTarget(Target):
    """Stops the run at the validation that meets the target, and records three clocks.

    - `train_seconds`, the headline: from before the first training step to the start of the
      validation that meets the target, without earlier validations and without the saving of
      `last.ckpt`, or of other checkpoints after a validation. `data_seconds` is the part of it
      spent on making batches.
    - `compile_seconds`: compilation on dummy data before the first step. What compiles later, on
      real data, counts as training.
    - `wall_seconds`: from the start of the process, or the call of `hlbgpt.fit`, to the target,
      everything included.

    The clocks continue where a checkpoint left them. The figures are printed, logged, and written
    to `record.json` in the run's folder, also if the run ends without meeting the target.

    Args:
        monitor: Logged metric to watch.
        target: Value at which the run stops.
        mode: `min` if the metric falls to the target, `max` if it rises to it.
        verbose: Whether to print a line after each validation.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        target: float = 3.8,
        mode: Literal["min", "max"] = "min",
        verbose: bool = True,
    ) -> None:
        super().__init__(monitor, target, mode)
        self.verbose = verbose
        self.reached = False
        self._train, self._validation, self._checkpoint = Stopwatch(), Stopwatch(), Stopwatch()
        # Of earlier processes of this run.
        self._before = {"data_seconds": 0.0, "compile_seconds": 0.0, "wall_seconds": 0.0}
        self._data, self._compile_seconds = Stopwatch(), 0.0
        self._last: dict[str, Any] | None = None  # what the last validation measured
        self._dropped_at: int | None = None  # step of a resume at which that did not count any more
        self._values: list[tuple[float, float]] = []  # seconds of training, monitored value
        self._record: dict[str, Any] | None = None
        self._ended = False  # whether the last step is made

    # --- the clocks ---------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise InputError where the record would replace that of another run."""
        occupy(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        pl_module.clock, pl_module.checkpoint_clock = self._train, self._checkpoint
        self._compile_seconds = pl_module.compile_seconds
        self._data = pl_module.train_loader.wait
        self._drop_other_measurement(trainer, pl_module)
        if self._last and self.is_met(self._last["value"]):
            self.reached = trainer.should_stop = True  # by the run that is resumed
            return
        synchronize(pl_module.device)
        self._train.start()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._train.running:
            synchronize(pl_module.device)
            self._train.stop()
            self._validation.start()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        if not self._validation.running:
            return
        synchronize(pl_module.device)
        self._validation.stop()
        self._last = self.measure(trainer, pl_module)
        value = self._last["value"]
        self._values.append((self._train.seconds, value))
        self.reached = trainer.strategy.reduce_boolean_decision(self.is_met(value))
        if self.reached:
            trainer.should_stop = True
            self._publish(trainer, pl_module)
            return
        if self.verbose:
            eta = self.eta(trainer, pl_module)
            line = (
                f"step {trainer.global_step:>6}  {pl_module.tokens_seen / 1e6:.2f}M tokens  "
                f"{self.monitor} {value:.4f}  {self._train.seconds:.1f} s  {eta}"
            )
            pl_module.print(line.rstrip())
        pl_module.clock_due = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = True  # training is one epoch

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        synchronize(pl_module.device)
        self._train.stop()
        if self._record is None:
            self._publish(trainer, pl_module)
        self._log(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the record last: a folder without record.json can be resumed."""
        assert isinstance(pl_module, LanguageModule)
        if nothing_was_left := self._record is None:  # by the run that is resumed
            self._drop_other_measurement(trainer, pl_module)
            self.reached = self._last is not None and self.is_met(self._last["value"])
            self._publish(trainer, pl_module)
        self._write(trainer)
        if nothing_was_left:
            self._log(trainer)
        self._record, self._ended = None, False  # the callback may fit once more

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """An error after the end of training, such as that of another callback, costs no record.

        Before the last checkpoint is saved there is none, so that the run can be resumed.
        """
        assert isinstance(pl_module, LanguageModule)
        savers = [c for c in callbacks_of(trainer) if isinstance(c, LastCheckpoint)]
        saved = all(saver.saved_step == trainer.global_step for saver in savers)
        if (self._ended or self._record) and saved and not isinstance(exception, DivergedError):
            if self._record is None:
                self._train.stop()
                self._publish(trainer, pl_module)
            self._write(trainer)
        self._record, self._ended = None, False

    def clocks(self) -> dict[str, float]:
        """All clocks in seconds, with those of earlier processes of the run."""
        return {
            "train_seconds": self._train.seconds,
            "data_seconds": self._before["data_seconds"] + self._data.seconds,
            "validation_seconds": self._validation.seconds,
            "checkpoint_seconds": self._checkpoint.seconds,
            "compile_seconds": self._before["compile_seconds"] + self._compile_seconds,
            "wall_seconds": self._before["wall_seconds"] + run_seconds(),
        }

    def state_dict(self) -> dict[str, Any]:
        return {**self.clocks(), "last_measurement": self._last, "values": self._values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._train = Stopwatch(state_dict["train_seconds"])
        self._validation = Stopwatch(state_dict["validation_seconds"])
        self._checkpoint = Stopwatch(state_dict["checkpoint_seconds"])
        self._before = {name: state_dict[name] for name in self._before}
        self._last, self._values = state_dict["last_measurement"], state_dict["values"]

    def eta(self, trainer: L.Trainer, module: LanguageModule) -> str:
        """When the target or the end of the run is expected, in words; empty if not known."""
        now, done = self._train.seconds, fraction_done(trainer, module)
        left = seconds_to_target(self._values, self.target)
        if left is not None:
            left = max(0.0, left - (now - self._values[-1][0]))
        if done:
            end = now / done * (1 - done)
            if left is None or left > end:
                return f"ends in about {in_words(end)}" if done < 1 else ""
        return "" if left is None else f"target in about {in_words(left)}"

    def _drop_other_measurement(self, trainer: L.Trainer, module: LanguageModule) -> None:
        """After a resume, a value of another metric, text or part of it is measured anew."""
        if self._last is not None and not self.still_holds(self._last, trainer, module):
            self._last, self._values, self._dropped_at = None, [], trainer.global_step

    def _publish(self, trainer: L.Trainer, module: LanguageModule) -> None:
        """Make the record and print it."""
        if self._dropped_at == trainer.global_step:
            raise InputError(
                f"time_to_target: the run has made all its steps, but its last validation was not "
                f"of {self.monitor} on this text, in windows of this length; resume it with the "
                "settings of its run, or measure the checkpoint with `hlbgpt validate`"
            )
        last = self._last or {"value": None, "step": None, "validation": None}
        result = {
            "reached": self.reached,
            "monitor": self.monitor,
            "target": self.target,
            "mode": self.mode,
            "value": last["value"],  # of the last validation, which was made at `value_step`
            "value_step": last["step"],
            "validation": last["validation"],
        }
        self._record = make_record(trainer, module, result, self.clocks())
        module.print(summary(self._record))

    def _log(self, trainer: L.Trainer) -> None:
        if run_folder(trainer) is not None and trainer.is_global_zero and self._record:
            log_record(trainer, self._record)

    def _write(self, trainer: L.Trainer) -> None:
        folder = run_folder(trainer)
        if folder is not None and trainer.is_global_zero and self._record:
            record = {**self._record, "checkpoint_seconds": self._checkpoint.seconds}
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / RECORD, record)
