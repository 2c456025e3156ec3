"""What hlb-gpt 0.4.1 changes while it trains: sequence length, batch and weight decay."""

import random
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from hlbgpt.callbacks.token_schedule import train_stream
from hlbgpt.optim.schedules import steered_batch
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.errors import require_positive
from hlbgpt.utils.seed import run_seed


class SequenceGrowth(L.Callback):
    """Doubles the sequence length every so many steps, up to `data.sequence_length`.

    A micro-batch keeps its tokens, up to whole windows: `data.micro_batch_size` windows of
    `data.sequence_length`.

    Args:
        initial: Sequence length at the start.
        every_n_steps: Steps between two doublings.
    """

    def __init__(self, initial: int = 32, every_n_steps: int = 80) -> None:
        require_positive("SequenceGrowth ", initial=initial, every_n_steps=every_n_steps)
        self.initial, self.every_n_steps = initial, every_n_steps
        self._shapes: list[tuple[int, int]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        assert isinstance(pl_module, LanguageModule)
        longest = pl_module.data.sequence_length
        tokens = pl_module.data.micro_batch_size * longest
        lengths = [min(self.initial, longest)]
        while lengths[-1] < longest:
            lengths.append(min(2 * lengths[-1], longest))
        self._shapes = pl_module.train_shapes = [(tokens // length, length) for length in lengths]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._apply(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._apply(trainer)

    def _apply(self, trainer: L.Trainer) -> None:
        # The step whose number is a multiple is the last of its length; the first has number 0.
        doublings = max(0, trainer.global_step - 1) // self.every_n_steps
        train_stream(trainer).reshape(*self._shapes[min(doublings, len(self._shapes) - 1)])


class SteeredBatch(L.Callback):
    """Adds micro-batches to a step while the gradient norm is above where it is expected.

    See `hlbgpt.optim.schedules.steered_batch`. The next step takes as many micro-batches as the whole
    part says, one more with the fraction as the probability, and at least one. With
    `trainer.accumulate_grad_batches` above 1, that many batches count as one.

    Looking at the norm waits for the device, every `every_n_steps` steps.

    Args:
        rate: How fast the number of micro-batches follows, for each step between two looks.
        every_n_steps: Steps between two looks.
    """

    def __init__(self, rate: float = 0.1, every_n_steps: int = 5) -> None:
        require_positive("SteeredBatch ", every_n_steps=every_n_steps)
        self.rate, self.every_n_steps = rate, every_n_steps
        self.estimate = 0.0
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
        step = trainer.global_step
        if step % self.every_n_steps == 0:
            self.estimate = steered_batch(
                self.estimate,
                grad_norm=pl_module.grad_norm().item(),
                parameters=sum(p.numel() for p in pl_module.net.parameters()),
                step=step,
                rate=self.rate * self.every_n_steps,
            )
        # From seed and step: the same on every rank, and after a restart.
        coin = random.Random(f"{run_seed()} {step}").random()
        whole = int(self.estimate)
        self.micro_batches = max(1, whole + (coin < self.estimate - whole))
        pl_module.micro_batches = self.micro_batches * self._unit

    def state_dict(self) -> dict[str, Any]:
        return {"estimate": self.estimate, "micro_batches": self.micro_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.estimate = state_dict["estimate"]
        self.micro_batches = state_dict["micro_batches"]
