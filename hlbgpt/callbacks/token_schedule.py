"""The schedule: a table of shapes, learning rate, momentum and validations, in tokens."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from hlbgpt.data.loaders import TokenStream
from hlbgpt.optim.schedules import Row, Step, plan_steps, require_sane, shapes
from hlbgpt.training.memory import fitting_tokens, forward_and_backward
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.clock import Stopwatch
from hlbgpt.utils.errors import InputError, require_positive


class TokenSchedule(L.Callback):
    """Lets a run follow a table in tokens; with an empty table it does nothing.

    The table decides over `data.sequence_length`, `data.micro_batch_size`, the number of steps and
    when to validate. Each step is a pure function of its number, so a resumed run goes on exactly.

    Args:
        table: Rows, see `hlbgpt.optim.schedules.Row`.
        micro_batch_tokens: Most tokens of a micro-batch on a device, or `auto` for what its memory
            holds. It changes memory and speed, not what is learned.
    """

    def __init__(
        self, table: Sequence[Row] = (), micro_batch_tokens: int | Literal["auto"] = "auto"
    ) -> None:
        if micro_batch_tokens != "auto":
            require_positive("schedule.", micro_batch_tokens=micro_batch_tokens)
        self.table, self.micro_batch_tokens = list(table), micro_batch_tokens
        self.steps: list[Step] = []
        if self.table:
            try:
                require_sane(self.table)
            except ValueError as error:
                raise InputError(f"schedule.table: {error}") from error

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Plan the steps. Raises InputError where table, text and other settings do not fit."""
        if not self.table or trainer.state.fn != TrainerFn.FITTING:
            return
        assert isinstance(pl_module, LanguageModule)
        tokens = self.micro_batch_tokens
        # Until the network is on its device, a window a micro-batch stands for what will fit.
        self._plan(trainer, pl_module, 1 if tokens == "auto" else tokens)
        self._require_fitting(trainer, pl_module)
        if trainer.max_steps < 0:
            trainer.fit_loop.epoch_loop.max_steps = len(self.steps)
        pl_module.steps.validates = lambda step: self.steps[step].validate

    def _plan(self, trainer: L.Trainer, module: LanguageModule, micro_batch_tokens: int) -> None:
        self.steps = plan_steps(
            self.table, micro_batch_tokens=micro_batch_tokens, world_size=trainer.world_size
        )
        module.train_shapes = list(shapes(self.steps))
        first = self.steps[0]
        module.data.micro_batch_size = first.batch_size
        module.data.sequence_length = first.sequence_length

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find out what fits, now that the network is where it trains."""
        if not self.steps:
            return
        assert isinstance(pl_module, LanguageModule)
        longest = max(step.sequence_length for step in self.steps)
        if self.micro_batch_tokens == "auto":
            most = max(step.tokens() for step in self.steps)
            with trainer.precision_plugin.forward_context():
                tokens = fitting_tokens(pl_module.net, longest, most, pl_module.device)
            tokens = trainer.strategy.broadcast(tokens)  # one plan for all devices
            self._plan(trainer, pl_module, tokens)
            pl_module.print(f"schedule.micro_batch_tokens: auto: {tokens:,}")
        if pl_module.device.type == "cpu":
            self._say_how_long(trainer, pl_module, longest)

    def _say_how_long(self, trainer: L.Trainer, module: LanguageModule, length: int) -> None:
        """Before anything that takes long: on a CPU a run may take hours, and compiling minutes."""
        tokens = sum(step.tokens() for step in self.steps[: trainer.max_steps])
        with trainer.precision_plugin.forward_context():
            for _ in range(2):  # what is measured is the second
                watch = Stopwatch()
                watch.start()
                forward_and_backward(module.net.forward, module.net, (1, length), module.device)
        minutes = watch.seconds / length * tokens / 60
        module.print(
            f"on this CPU about {minutes:.1f} minutes of training for {tokens / 1e6:.2f}M tokens"
        )

    def _require_fitting(self, trainer: L.Trainer, module: LanguageModule) -> None:
        if trainer.max_steps > len(self.steps):
            raise InputError(
                f"trainer.max_steps: {trainer.max_steps}, but schedule.table ends after "
                f"{len(self.steps)} steps; leave it at -1, or lengthen the table"
            )
        if module.lr_scheduler is not None:
            raise InputError(
                "model.lr_scheduler: the learning rate follows schedule.table; leave it out, or "
                "set the table to []"
            )
        longest, context = (
            max(s.sequence_length for s in self.steps),
            module.net.max_sequence_length,
        )
        if context is not None and longest > context:
            raise InputError(
                f"schedule.table: sequence_length {longest} is longer than the network's context "
                f"(max_sequence_length {context}); lower it or give the network more"
            )
        for batch_size, length in shapes(self.steps):
            module.data.require_batch(batch_size, length, key="schedule.table")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._apply(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any
    ) -> None:
        self._apply(trainer, pl_module)  # over what a checkpoint with other micro-batches says

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._apply(trainer, pl_module)

    def _apply(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Set what the next step asks for; in the middle of a step, what holds already."""
        if not self.steps or trainer.global_step >= len(self.steps):
            return
        assert isinstance(module, LanguageModule)
        step = self.steps[trainer.global_step]
        module.micro_batches = step.micro_batches
        train_stream(trainer).reshape(step.batch_size, step.sequence_length)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] * step.lr
            if step.momentum is not None and "momentum" in group:
                group["momentum"] = step.momentum


def train_stream(trainer: L.Trainer) -> TokenStream:
    """The stream that the run's training batches come from."""
    loader = trainer.fit_loop._combined_loader
    assert loader is not None
    return next(stream for stream in loader.flattened if isinstance(stream, TokenStream))
