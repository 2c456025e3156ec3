"""The seed's growing batch."""

import math
import random
from typing import Any

import lightning as L
import torch

from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.seed import run_seed


class BatchGrowth(L.Callback):
    """Adds micro-batches to a step as the gradient norm stops falling (hlb-gpt 0.1.0).

    With g the gradient norm of a step, m its moving average and k the step's micro-batches, the
    estimate n of the best number changes by k * rate * (target - (m - g)) and is at least 1; the
    next step takes floor(n) micro-batches, or one more with the fraction of n as the probability.
    The batch therefore stays small while the norm falls faster than `target` a step.

    With `trainer.accumulate_grad_batches` above 1, that many batches count as one: four of
    16 windows train like one of 64.

    The rule needs the norm on the host, so every step waits for the device, as the seed did.

    Args:
        rate: How fast the estimate follows.
        target: The fall of the gradient norm below its average that leaves n as it is.
        decay: Of the moving average.
        initial_norm: Where the moving average starts.
    """

    def __init__(
        self,
        rate: float = 5e-2,
        target: float = 3e-2,
        decay: float = 0.95,
        initial_norm: float = 1.2,
    ) -> None:
        self.rate, self.target, self.decay = rate, target, decay
        self.average = initial_norm
        self.estimate = 1.0
        self.micro_batches = 1
        self._unit = 1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        self._unit = trainer.accumulate_grad_batches
        pl_module.micro_batches = self.micro_batches * self._unit

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, LanguageModule)
        if pl_module.steps.skipped:
            return
        # From seed and step: the same on every rank, and after a restart.
        coin = random.Random(f"{run_seed()} {trainer.global_step}").random()
        self.update(pl_module.grad_norm().item(), coin=coin)
        pl_module.micro_batches = self.micro_batches * self._unit

    def update(self, norm: float, *, coin: float) -> None:
        """Take in the gradient norm of a step; `coin` is uniform in [0, 1)."""
        self.average = self.decay * self.average + (1 - self.decay) * norm
        change = self.rate * (self.target - (self.average - norm))
        self.estimate = max(1.0, self.estimate + self.micro_batches * change)
        whole = math.floor(self.estimate)
        self.micro_batches = whole + (coin < self.estimate - whole)

    def state_dict(self) -> dict[str, Any]:
        return {
            "average": self.average,
            "estimate": self.estimate,
            "micro_batches": self.micro_batches,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average = state_dict["average"]
        self.estimate = state_dict["estimate"]
        self.micro_batches = state_dict["micro_batches"]
