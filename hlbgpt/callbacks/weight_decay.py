"""hlb-gpt's weight decay, which grows as the loss falls."""

import lightning as L
import torch

from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.errors import InputError


class LossScaledWeightDecay(L.Callback):
    """Decoupled weight decay of block matrices, which grows as the loss falls.

    Its strength is `strength` / loss² (hlb-gpt 0.1.0), or with a base `strength` / base^loss
    (0.4.1).

    Computed on the device: a strength set in the optimizer would have to be a number on the host.
    Give the optimizer itself `weight_decay: 0`.

    Args:
        strength: A step multiplies weights by 1 - lr * strength / loss², or 1 - lr * strength /
            base^loss.
        base: Of the exponential law.
    """

    def __init__(self, strength: float = 1.5e-2, base: float | None = None) -> None:
        if base is not None and base <= 0:
            raise InputError(f"LossScaledWeightDecay base: {base} is not above 0; raise it")
        self.strength, self.base = strength, base

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, LanguageModule)
        if pl_module.steps.skipped:
            return
        loss = pl_module.step_loss
        decay = self.strength / (loss**2 if self.base is None else self.base**loss)
        for group in optimizer.param_groups:
            if group.get("name") == "block_matrices":
                keep = 1 - group["lr"] * decay
                torch._foreach_mul_(group["params"], keep)
