"""Stops a run whose loss or gradient is not finite any more."""

import math

import lightning as L
import torch
from torch import Tensor

from hlbgpt.runs.folder import last_checkpoint, run_folder
from hlbgpt.training.module import LanguageModule
from hlbgpt.training.step import mean_over_ranks
from hlbgpt.training.step_metrics import grad_norm
from hlbgpt.utils.errors import DivergedError


class StopOnDivergence(L.Callback):
    """Stops within one logging interval of the first loss or gradient that is not finite.

    Losses are checked every `trainer.log_every_n_steps` steps and before each validation, so that
    no step waits for the device. Such a run gets no record, and its checkpoint stays as it was.
    """

    def __init__(self) -> None:
        self._unchecked: list[tuple[int, list[Tensor]]] = []  # steps and their losses
        self._last_finite: tuple[int, float] | None = None

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, LanguageModule)
        step, every = trainer.global_step + 1, trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._unchecked.append((step, pl_module.step_losses))
        if step % every:
            return
        self._check_losses(trainer)
        # A gradient scaler meets infinities as a matter of course, and skips such a step.
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            norm = grad_norm(list(pl_module.parameters()))
            self._require_finite(trainer, step, "gradient norm", norm.item())

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check_losses(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = trainer.callback_metrics.get("val_loss")
        if trainer.state.fn == "fit" and not trainer.sanity_checking and loss is not None:
            self._require_finite(trainer, trainer.global_step, "val_loss", loss.item())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check_losses(trainer)

    def _check_losses(self, trainer: L.Trainer) -> None:
        """Check the losses of all ranks since the last time; waits for the device once."""
        if not self._unchecked:
            return
        losses = torch.stack([torch.stack(losses).mean() for _, losses in self._unchecked])
        steps = [step for step, _ in self._unchecked]
        self._unchecked = []
        for step, loss in zip(steps, mean_over_ranks(losses).tolist(), strict=True):
            if not math.isfinite(loss):
                break
            self._last_finite = step, loss
        self._require_finite(trainer, step, "train loss", loss)

    def _require_finite(self, trainer: L.Trainer, step: int, name: str, value: float) -> None:
        """Raise DivergedError if `value`, which is the same on every rank, is not finite."""
        if math.isfinite(value):
            return
        last = "no loss was finite"
        if self._last_finite:
            last = "the last finite loss was {1:.4f} at step {0}".format(*self._last_finite)
        raise DivergedError(
            f"diverged: {name} is {value} at step {step}; {last}; {_advice(trainer)}"
        )


def _advice(trainer: L.Trainer) -> str:
    folder = run_folder(trainer)
    kept = "no checkpoint had been saved"
    if folder is not None and (path := last_checkpoint(folder)).is_file():
        kept = f"the last good checkpoint is {path}"
    return f"{kept}; start a new run with a lower learning rate"
