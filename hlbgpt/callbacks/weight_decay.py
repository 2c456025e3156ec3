"""The seed's weight decay, which grows as the loss falls."""

import lightning as L
import torch

from hlbgpt.module import LanguageModule


class LossScaledWeightDecay(L.Callback):
    """Decoupled weight decay of block matrices with strength `strength` / loss² (hlb-gpt 0.1.0).

    Computed on the device: a strength set in the optimizer would have to be a number on the host.
    Give the optimizer itself `weight_decay: 0`.

    Args:
        strength: Decay at a loss of 1 nat; a step multiplies weights by 1 - lr * strength / loss².
    """

    def __init__(self, strength: float = 1.5e-2) -> None:
        self.strength = strength

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, LanguageModule)
        if pl_module.steps.skipped:
            return
        for group in optimizer.param_groups:
            if group.get("name") == "block_matrices":
                keep = 1 - group["lr"] * self.strength / pl_module.step_loss**2
                torch._foreach_mul_(group["params"], keep)
