"""Stops a run whose loss or gradient is no number any more."""

import math

import lightning as L
import torch
from torch import Tensor

from hlbgpt.runs.folder import last_checkpoint, run_folder
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.errors import DivergedError, InputError


class StopOnDivergence(L.Callback):
    """Stops within one logging interval of the first loss or gradient that is not finite.

    Losses are looked at every `trainer.log_every_n_steps` steps and before each validation, so
    no step waits for the device. No record is made of such a run, and its checkpoint is left as it
    was when all was well.

    Args:
        max_skipped_steps: Leave out up to so many bad steps in a row before stopping: weights and
            optimizer stay as they are, the data and the schedule go on. Above 0, every step waits
            for the device.
    """

    def __init__(self, max_skipped_steps: int = 0) -> None:
        if max_skipped_steps < 0:
            raise InputError(
                f"divergence.max_skipped_steps: {max_skipped_steps} is negative; use 0 or more"
            )
        self.max_skipped_steps = max_skipped_steps
        self.skipped = 0  # in a row
        self._recent: list[tuple[int, list[Tensor]]] = []  # steps and losses not looked at yet
        self._last_finite: tuple[int, float] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # First of all: what others do with a bad step, and at the end of a run, comes after.
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, LanguageModule)
        step = trainer.global_step + 1
        self._recent.append((step, pl_module.steps.losses))
        if self.max_skipped_steps:
            self._skip_if_bad(trainer, pl_module, step)
        elif step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._check(trainer, pl_module)
            # A gradient scaler meets infinities as a matter of course, and leaves the step out.
            if getattr(trainer.precision_plugin, "scaler", None) is None:
                self._require(trainer, pl_module, step, "gradient norm", pl_module.grad_norm())

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = trainer.callback_metrics.get("val_loss")
        if trainer.state.fn == "fit" and not trainer.sanity_checking and loss is not None:
            self._require(trainer, pl_module, trainer.global_step, "val_loss", loss)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check(trainer, pl_module)

    def _check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the losses since the last time; waits for the device once."""
        if not self._recent:
            return
        means = torch.stack([torch.stack(losses).mean() for _, losses in self._recent]).tolist()
        steps = [step for step, _ in self._recent]
        self._recent = []
        bad: tuple[int, float] = (steps[-1], 0.0)
        for step, loss in zip(steps, means, strict=True):
            if not math.isfinite(loss):
                bad = step, loss
                break
            self._last_finite = step, loss
        self._require(trainer, pl_module, bad[0], "train loss", bad[1])

    def _require(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        step: int,
        name: str,
        value: Tensor | float,
    ) -> None:
        """Raise DivergedError, on every rank, if `value` is not finite on one of them."""
        value = float(value)
        if not trainer.strategy.reduce_boolean_decision(not math.isfinite(value), all=False):
            return
        last = "no loss was finite"
        if self._last_finite:
            last = f"the last finite loss was {self._last_finite[1]:.4f} at step "
            last += str(self._last_finite[0])
        raise DivergedError(
            f"diverged: {name} is {value} at step {step}; {last}; {_where_to_go_on(trainer)}"
        )

    def _skip_if_bad(self, trainer: L.Trainer, pl_module: LanguageModule, step: int) -> None:
        loss, norm = float(pl_module.step_loss), float(pl_module.grad_norm())
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not trainer.strategy.reduce_boolean_decision(not finite, all=False):
            self._recent, self.skipped = [], 0
            self._last_finite = step, loss
            return
        self.skipped += 1
        if self.skipped > self.max_skipped_steps:
            self._check(trainer, pl_module)
            self._require(trainer, pl_module, step, "gradient norm", math.nan)
        self._recent = []
        pl_module.print(
            f"step {step:>6}  left out: loss {loss:.4f}, gradient norm {norm:.4f} "
            f"({self.skipped} in a row, {self.max_skipped_steps} allowed)"
        )
        pl_module.skip_step()


def _where_to_go_on(trainer: L.Trainer) -> str:
    folder = run_folder(trainer)
    if folder is None or not (path := last_checkpoint(folder)).is_file():
        return "no checkpoint had been saved; lower the learning rate and start again"
    return (
        f"the last good checkpoint is {path}; go on from it with a lower learning rate, or with "
        "--divergence.max_skipped_steps 1"
    )
