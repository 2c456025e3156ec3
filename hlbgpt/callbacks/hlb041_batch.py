"""Sequence length and batch of hlb-gpt 0.4.1, which both change while it trains."""

import math

import lightning as L
import torch

from hlbgpt.callbacks.step_shape import EstimatedBatchSize, StepShape
from hlbgpt.optim.schedules import hlb041_micro_batches
from hlbgpt.training.module import LanguageModule
from hlbgpt.training.step_metrics import grad_norm
from hlbgpt.utils.errors import require_positive


class SequenceLengthDoubling(StepShape):
    """Doubles the sequence length every so many steps, up to `data.sequence_length`.

    A micro-batch keeps its number of tokens, `data.micro_batch_size` x `data.sequence_length`,
    rounded down to whole windows.

    Args:
        initial: Sequence length at the start.
        every_n_steps: Steps between two doublings.
    """

    def __init__(self, initial: int = 32, every_n_steps: int = 80) -> None:
        require_positive("SequenceLengthDoubling ", initial=initial, every_n_steps=every_n_steps)
        self.initial, self.every_n_steps = initial, every_n_steps

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            assert isinstance(pl_module, LanguageModule)
            pl_module.train_shapes = self._shapes(pl_module)

    def _shapes(self, module: LanguageModule) -> list[tuple[int, int]]:
        """(B, T) for each sequence length."""
        longest, (_, windows) = module.data.sequence_length, module.data.device_batch
        lengths = [min(self.initial, longest)]
        while lengths[-1] < longest:
            lengths.append(min(2 * lengths[-1], longest))
        return [(windows * longest // length, length) for length in lengths]

    def next_step(self, trainer: L.Trainer, module: LanguageModule) -> dict[str, int]:
        # As in hlb-gpt, whose steps are counted from 0: a step whose number is a multiple of
        # `every_n_steps` is the last of its length.
        doublings = max(0, trainer.global_step - 1) // self.every_n_steps
        shapes = self._shapes(module)
        windows, length = shapes[min(doublings, len(shapes) - 1)]
        return {"batch_size": windows, "sequence_length": length}


class HLB041BatchSize(EstimatedBatchSize):
    """Adds micro-batches to a step while the gradient norm is above where it is expected.

    The rule is `hlbgpt.optim.schedules.hlb041_micro_batches`. Looking at the norm makes the host
    wait for the device, every `every_n_steps` steps.

    Args:
        rate: How fast the number of micro-batches follows, per step.
        every_n_steps: Number of steps between two readings of the gradient norm.
    """

    def __init__(self, rate: float = 0.1, every_n_steps: int = 5) -> None:
        require_positive("HLB041BatchSize ", every_n_steps=every_n_steps)
        super().__init__(estimate=0.0)
        self.rate, self.every_n_steps = rate, every_n_steps

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        step, parameters = trainer.global_step, list(pl_module.parameters())
        norm = grad_norm(parameters).item() if step % self.every_n_steps == 0 else math.nan
        if math.isfinite(norm):  # a gradient scaler skips steps that overflow
            self.estimate = hlb041_micro_batches(
                self.estimate,
                grad_norm=norm,
                parameters=sum(parameter.numel() for parameter in parameters),
                step=step,
                rate=self.rate * self.every_n_steps,
            )
        self.draw(step)
