"""A target: a value that a metric has to meet, and a milestone on the way to it."""

from typing import Any, Literal

import lightning as L

from hlbgpt.training import evaluation
from hlbgpt.training.checks import callbacks_of
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.errors import InputError


class Target(L.Callback):
    """Base of callbacks that wait for a metric to meet a value.

    Args:
        monitor: Logged metric to watch, of the project's or of another callback's.
        target: Value to be met.
        mode: `min` if the metric falls to the target, `max` if it rises to it.
    """

    def __init__(self, monitor: str, target: float, mode: Literal["min", "max"]) -> None:
        self.monitor, self.target, self.mode = monitor, target, mode

    def is_met(self, value: float) -> bool:
        """Whether this `value` of the metric meets the target."""
        return value <= self.target if self.mode == "min" else value >= self.target

    def read(self, trainer: L.Trainer) -> float:
        """The metric's value of the validation that was just made."""
        return float(trainer.callback_metrics[self.monitor])

    def measure(self, trainer: L.Trainer, module: LanguageModule) -> dict[str, Any]:
        """The value of the validation that was just made, and what it was measured on."""
        return {
            "monitor": self.monitor,
            "value": self.read(trainer),
            "step": trainer.global_step,
            "validation": module.measured,
        }

    def still_holds(
        self, measured: dict[str, Any] | None, trainer: L.Trainer, module: LanguageModule
    ) -> bool:
        """Whether what `measure` returned before a resume would be measured the same now."""
        return (
            measured is not None
            and measured["monitor"] == self.monitor
            and evaluation.still_holds(measured["validation"], trainer, module.data)
        )


class Milestone(Target):
    """A second target, which does not stop the run: notes when it was met.

    The time is that of the run's clock, `train_seconds`. It is printed, and `record.json` lists it
    under `milestones`. The run needs its `TimeToTarget`, which runs the clock.

    Args:
        monitor: Logged metric to watch.
        target: Value to be met.
        mode: `min` if the metric falls to the target, `max` if it rises to it.
    """

    def __init__(
        self, target: float, monitor: str = "val_loss", mode: Literal["min", "max"] = "min"
    ) -> None:
        super().__init__(monitor, target, mode)
        self.met: dict[str, Any] | None = None  # value, step, tokens and train_seconds

    @property
    def state_key(self) -> str:
        """Tells several milestones of a run apart in its checkpoint."""
        return f"Milestone({self.monitor}, {self.mode}, {self.target})"

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        targets = [c for c in callbacks_of(trainer) if isinstance(c, Target)]
        if all(isinstance(c, Milestone) for c in targets):
            raise InputError(
                f"{type(self).__name__}: the run has no time_to_target, whose clock it reads; "
                "take both out, or neither"
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        if trainer.state.fn != "fit" or trainer.sanity_checking or self.met is not None:
            return
        measured = self.measure(trainer, pl_module)
        if not self.is_met(measured["value"]):
            return
        self.met = {
            **measured,
            "tokens": pl_module.tokens_seen,
            "train_seconds": pl_module.clock.seconds,
        }
        pl_module.print(
            f"milestone: {self.monitor} {measured['value']:.4f} (target {self.target:g}) at step "
            f"{trainer.global_step} after {pl_module.tokens_seen / 1e6:.2f}M tokens: "
            f"{pl_module.clock.seconds:.1f} s of training"
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run resumed with another validation text has its milestones still to meet."""
        assert isinstance(pl_module, LanguageModule)
        if not self.still_holds(self.met, trainer, pl_module):
            self.met = None

    def figures(self) -> dict[str, Any]:
        """What `record.json` says of this milestone."""
        asked = {"monitor": self.monitor, "target": self.target, "mode": self.mode}
        return {**asked, "reached": self.met is not None, **(self.met or {})}

    def state_dict(self) -> dict[str, Any]:
        return {"met": self.met}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.met = state_dict["met"]
