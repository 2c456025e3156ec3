"""Progress of a run: a progress bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from hlbgpt.callbacks.eta import fraction_done
from hlbgpt.callbacks.time_to_target import TimeToTarget
from hlbgpt.training.checks import callbacks_of
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.errors import require_positive

_FIRST_LINE = 5.0  # seconds of training until the first plain line


class Console(ProgressBar):
    """Shows step, tokens, loss, tokens per second and ETA.

    Loss and speed are the last logged ones, from every `trainer.log_every_n_steps` steps, so that
    the display never makes the host wait for the device.

    Args:
        every_seconds: Seconds between two plain lines, where the output is no terminal.
    """

    def __init__(self, every_seconds: int = 30) -> None:
        super().__init__()
        require_positive("console.", every_seconds=every_seconds)
        self.every_seconds = every_seconds
        self.is_enabled = True
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._next_line = 0.0

    def disable(self) -> None:
        self.is_enabled = False

    def enable(self) -> None:
        self.is_enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the progress bar, where there is one."""
        if self._bar is not None:
            self._bar.console.print(*args, markup=False, highlight=False, soft_wrap=True)
        elif self.is_enabled:
            print(*args, **kwargs, flush=True)

    # --- hooks --------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._next_line = time.monotonic() + min(_FIRST_LINE, self.every_seconds)
        if not (self.is_enabled and sys.stdout.isatty()):
            return
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}")
        self._bar = Progress(*columns, console=Terminal(), refresh_per_second=4)
        self._task = self._bar.add_task("training", total=1.0, state="")
        self._bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any
    ) -> None:
        assert isinstance(pl_module, LanguageModule)
        if self._bar is not None:
            state = f"step {trainer.global_step}  {self._state(trainer, pl_module)}"
            done = fraction_done(trainer, pl_module)
            total = None if done is None else 1.0
            self._bar.update(
                self._task, description="training", completed=done or 0.0, total=total, state=state
            )
        elif self.is_enabled and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + self.every_seconds
            if not pl_module.validation_due:  # which prints a line of its own
                self.print(f"step {trainer.global_step:>6}  {self._state(trainer, pl_module)}")

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._bar is not None:
            share = batch_idx / sum(trainer.num_val_batches)
            self._bar.update(self._task, description=f"validation {share:.0%}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _state(self, trainer: L.Trainer, module: LanguageModule) -> str:
        logged = module.last_logged
        parts = [f"{module.tokens_seen / 1e6:.2f}M tokens"]
        if "train_loss" in logged:
            parts.append(f"train_loss {logged['train_loss']:.4f}")
        if "tokens_per_second" in logged:
            parts.append(f"{logged['tokens_per_second']:,.0f} tokens/s")
        clock = next((c for c in callbacks_of(trainer) if isinstance(c, TimeToTarget)), None)
        return "  ".join([*parts, *([clock.eta(trainer, module)] if clock else [])])
