"""Bases of the callbacks that change the batch while a run goes on."""

import math
import random
from typing import Any

import lightning as L

from hlbgpt.training.checks import require_no_accumulation
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.seed import run_seed


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


class EstimatedBatchSize(StepShape):
    """Takes as many micro-batches as an estimate says, and its fraction as a probability.

    A subclass updates the estimate once the gradients of a step are ready, and calls `draw`. With
    `data.micro_batches` above 1, that many micro-batches count as one: four of 16 windows train
    like one of 64. Several devices share out the windows of each.

    Attributes:
        estimate: Best number of micro-batches of a step, by the rule of the subclass.
        micro_batches: Number of micro-batches of the next step.
    """

    def __init__(self, estimate: float) -> None:
        self.estimate, self.micro_batches = estimate, 1

    def draw(self, step: int) -> None:
        """Round the estimate up or down by chance, to at least 1."""
        # From seed and step: the same on every rank, and after a restart.
        coin = random.Random(f"{run_seed()} {step}").random()
        whole = math.floor(self.estimate)
        self.micro_batches = max(1, whole + (coin < self.estimate - whole))

    def next_step(self, trainer: L.Trainer, module: LanguageModule) -> dict[str, int]:
        return {"micro_batches": self.micro_batches * module.data.device_batch[0]}

    def state_dict(self) -> dict[str, Any]:
        return {"estimate": self.estimate, "micro_batches": self.micro_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)
