"""Base of the callbacks that change the batch while a run goes on."""

from typing import Any

import lightning as L

from hlbgpt.training.checks import require_no_accumulation
from hlbgpt.training.module import LanguageModule


class StepShape(L.Callback):
    """Sets number and shape of the next step's micro-batches, at the start and after each step.

    A subclass overrides `next_step`. What it returns may depend on its own state and on
    `trainer.global_step`, so that a resumed run gets the same steps.
    """

    def next_step(self, trainer: L.Trainer, module: LanguageModule) -> dict[str, int]:
        """What changes: any arguments of `TrainLoader.set_step`."""
        raise NotImplementedError

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            require_no_accumulation(trainer, type(self).__name__)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        pl_module.train_loader.set_step(**self.next_step(trainer, pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, LanguageModule)
        pl_module.train_loader.set_step(**self.next_step(trainer, pl_module))
