"""The weight decay of hlb-gpt, which grows as the loss falls."""

import lightning as L
import torch

from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.errors import InputError


class LossScaledWeightDecay(L.Callback):
    """Decoupled weight decay of the block matrices, stronger the lower the loss is.

    A step multiplies these weights by 1 - lr * `strength` / loss² (hlb-gpt 0.1.0), or with a base
    by 1 - lr * `strength` / base^loss (0.4.1). It is computed on the device, so that no step waits
    for the host. The optimizer itself should have `weight_decay: 0`.

    Args:
        strength: Strength of the decay.
        base: Base of the exponential law; None for the square.
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
        loss = pl_module.step_loss
        decay = self.strength / (loss**2 if self.base is None else self.base**loss)
        for group in optimizer.param_groups:
            if group.get("name") == "block_matrices":
                torch._foreach_mul_(group["params"], 1 - group["lr"] * decay)
