"""What a person sees of a run: a progress bar on a terminal, plain lines on a pipe or in CI."""

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TextColumn

from hlbgpt.callbacks.time_to_target import TimeToTarget, in_millions
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.errors import require_positive

_FIRST_LINE = 5.0  # seconds of training until a first plain line


class Console(ProgressBar):
    """Shows step, tokens, loss, tokens a second, and when the target is to be expected.

    Loss and speed are those last logged, every `trainer.log_every_n_steps` steps, so that nothing
    waits for the device because of what is shown. When the target is to be expected is worked out
    by `TimeToTarget` from the validations so far.

    Args:
        every_seconds: Between two plain lines, where the output is no terminal.
    """

    def __init__(self, every_seconds: int = 30) -> None:
        super().__init__()
        require_positive("console.", every_seconds=every_seconds)
        self.every_seconds = every_seconds
        self.is_enabled = True
        self._bar: Progress | None = None
        self._task: Any = None
        self._next_line = 0.0
        self._shown: dict[str, float] = {}  # last logged

    def disable(self) -> None:
        self.is_enabled = False

    def enable(self) -> None:
        self.is_enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Above the bar, where there is one."""
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
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self._task = self._bar.add_task("training", total=total, state="")
        self._bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any
    ) -> None:
        assert isinstance(pl_module, LanguageModule)
        if not self.is_enabled:
            return
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % interval == 0 and trainer.global_step:
            names = "train_loss", "tokens_per_second"
            metrics = trainer.callback_metrics
            self._shown = {name: float(metrics[name]) for name in names if name in metrics}
            due = time.monotonic() >= self._next_line and not pl_module.steps.validation_due
            if self._bar is None and due:
                self._next_line = time.monotonic() + self.every_seconds
                self.print(f"step {trainer.global_step:>6}  {self._state(trainer, pl_module)}")
        if self._bar is not None:
            state = self._state(trainer, pl_module)
            self._bar.update(
                self._task, description="training", completed=trainer.global_step, state=state
            )

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

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._next_line = time.monotonic() + self.every_seconds  # it has a line of its own

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
        parts = [f"{in_millions(module.tokens_seen)} tokens"]
        if "train_loss" in self._shown:
            parts.append(f"train_loss {self._shown['train_loss']:.4f}")
        if "tokens_per_second" in self._shown:
            parts.append(f"{self._shown['tokens_per_second']:,.0f} tokens/s")
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        clock = next((c for c in callbacks if isinstance(c, TimeToTarget)), None)
        return "  ".join([*parts, *([clock.outlook(trainer)] if clock else [])])
