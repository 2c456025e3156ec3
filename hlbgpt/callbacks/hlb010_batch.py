"""The batch of hlb-gpt 0.1.0, which grows while it trains."""

import math
import random
from typing import Any

import lightning as L
import torch

from hlbgpt.callbacks.step_shape import StepShape
from hlbgpt.training.module import LanguageModule
from hlbgpt.training.step_metrics import grad_norm
from hlbgpt.utils.seed import run_seed


class HLB010BatchSize(StepShape):
    """Adds micro-batches to a step as the gradient norm stops falling (hlb-gpt 0.1.0).

    With g the gradient norm of a step, m its moving average and k the step's micro-batches, the
    estimate n of the best number changes by k * rate * (target - (m - g)) and is at least 1. The
    next step takes floor(n) micro-batches, or one more with the fraction of n as the probability.
    So the batch stays small while the norm falls faster than `target` per step.

    With `data.micro_batches` above 1, that many micro-batches count as one: four of 16 windows
    train like one of 64.

    The rule needs the norm on the host, so every step waits for the device, as in hlb-gpt.

    Args:
        rate: How fast the estimate follows.
        target: Fall of the gradient norm below its average that leaves n unchanged.
        decay: Decay of the moving average.
        initial_norm: Initial value of the moving average.
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

    def next_step(self, trainer: L.Trainer, module: LanguageModule) -> dict[str, int]:
        return {"micro_batches": self.micro_batches * module.data.micro_batches}

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, LanguageModule)
        # From seed and step: the same on every rank, and after a restart.
        coin = random.Random(f"{run_seed()} {trainer.global_step}").random()
        self.update(grad_norm(list(pl_module.net.parameters())).item(), coin=coin)

    def update(self, norm: float, *, coin: float) -> None:
        """Take in the gradient norm of a step; `coin` is uniform in [0, 1)."""
        self.average = self.decay * self.average + (1 - self.decay) * norm
        change = self.rate * (self.target - (self.average - norm))
        self.estimate = max(1.0, self.estimate + self.micro_batches * change)
        whole = math.floor(self.estimate)
        self.micro_batches = whole + (coin < self.estimate - whole)

    def state_dict(self) -> dict[str, Any]:
        names = ("average", "estimate", "micro_batches")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)
