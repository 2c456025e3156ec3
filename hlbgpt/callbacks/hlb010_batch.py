"""The batch of hlb-gpt 0.1.0, which grows while it trains."""

import math
from typing import Any

import lightning as L
import torch

from hlbgpt.callbacks.step_shape import EstimatedBatchSize
from hlbgpt.training.step_metrics import grad_norm


class HLB010BatchSize(EstimatedBatchSize):
    """Adds micro-batches to a step as the gradient norm stops falling (hlb-gpt 0.1.0).

    With g the gradient norm of a step, m its moving average and k the step's micro-batches, the
    estimate of the best number changes by k * rate * (target - (m - g)) and is at least 1. So the
    batch stays small while the norm falls faster than `target` per step.

    The rule needs the norm on the host, so every step waits for the device, as in hlb-gpt.

    Args:
        rate: How fast the estimate follows.
        target: Fall of the gradient norm below its average that leaves the estimate unchanged.
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
        super().__init__(estimate=1.0)
        self.rate, self.target, self.decay = rate, target, decay
        self.average = initial_norm

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        norm = grad_norm(list(pl_module.parameters())).item()
        if math.isfinite(norm):  # a gradient scaler skips steps that overflow
            self.update(norm)
        self.draw(trainer.global_step)

    def update(self, norm: float) -> None:
        """Take in the gradient norm of a step."""
        self.average = self.decay * self.average + (1 - self.decay) * norm
        change = self.rate * (self.target - (self.average - norm))
        self.estimate = max(1.0, self.estimate + self.micro_batches * change)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "average": self.average}
