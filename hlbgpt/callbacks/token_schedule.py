"""The token schedule: a table of shapes, learning rate, momentum and validations, in tokens."""

from collections.abc import Sequence
from typing import Literal

import lightning as L

from hlbgpt.callbacks.step_shape import StepShape
from hlbgpt.optim.schedules import ScheduleRow, StepPlan, check_table, plan_steps, step_shapes
from hlbgpt.training.checks import require_context
from hlbgpt.training.memory import fitting_tokens
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.errors import InputError, require_positive


class TokenSchedule(StepShape):
    """Makes a run follow a table in tokens; with an empty table it does nothing.

    The table decides over shapes, micro-batches, learning rate, momentum, validations and the end
    of the run. Each step is a pure function of its number, so a resumed run continues exactly.

    Args:
        table: Rows, see `hlbgpt.optim.schedules.ScheduleRow`.
        micro_batch_tokens: Most tokens of a micro-batch on a device, or `auto` for what its memory
            holds. It changes memory and speed, not what is learned (but see `AdaptiveSoftmax` about
            its capacity, which small micro-batches exceed more often).
    """

    def __init__(
        self, table: Sequence[ScheduleRow] = (), micro_batch_tokens: int | Literal["auto"] = "auto"
    ) -> None:
        if micro_batch_tokens != "auto":
            require_positive("schedule.", micro_batch_tokens=micro_batch_tokens)
        self.table, self.micro_batch_tokens = list(table), micro_batch_tokens
        self.steps = StepPlan()
        if self.table:
            try:
                check_table(self.table)
            except ValueError as error:
                raise InputError(f"schedule.table: {error}") from error

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Plan the steps. Raises InputError where table, text and other settings do not fit."""
        if not self.table or stage != "fit":
            return
        super().setup(trainer, pl_module, stage)
        assert isinstance(pl_module, LanguageModule)
        tokens = self.micro_batch_tokens
        # What fits is known once the network is on its device; until then, plan single windows.
        self._plan(trainer, pl_module, 1 if tokens == "auto" else tokens)
        self._require_fitting(trainer, pl_module)
        pl_module.data.max_tokens = self.table[-1].tokens
        pl_module.validates_after = self._validates_after

    def _validates_after(self, step: int) -> bool:
        return step <= len(self.steps) and self.steps[step - 1].validate

    def _plan(self, trainer: L.Trainer, module: LanguageModule, micro_batch_tokens: int) -> None:
        self.steps = plan_steps(
            self.table, micro_batch_tokens=micro_batch_tokens, world_size=trainer.world_size
        )
        module.train_shapes = step_shapes(self.steps)
        first = self.steps[0]
        module.data.micro_batch_size = first.batch_size
        module.data.micro_batches = first.micro_batches * trainer.world_size
        module.data.sequence_length = first.sequence_length

    def other_sizes(self, devices: int) -> list[str]:
        """A line for each `step_tokens` of the table that so many devices cannot keep.

        Each device takes the same number of whole windows, and at least one.
        """
        if devices == 1:
            return []
        lines: dict[str, None] = {}
        for stage in self.steps.stages:
            rows = [row for row in self.table if row.tokens <= stage.first_token]
            asked = [row.step_tokens for row in rows if row.step_tokens][-1]
            if (made := self.steps[stage.first_step].tokens(devices)) != asked:
                lines[f"steps of {made:,} tokens on {devices} devices instead of {asked:,}"] = None
        return list(lines)

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
        second_loss = any(row.vocab_loss is not None for row in self.table)
        if second_loss and module.net.vocab_loss_weight is None:
            raise InputError(
                f"schedule.table: vocab_loss is set, but {type(module.net).__name__} has no "
                "pointer; leave the column out, or set model.net.pointer_dim of a FastGPT"
            )
        longest = max(stage.sequence_length for stage in self.steps.stages)
        require_context(module.net, longest, "schedule.table sequence_length")
        self._require_text(module)

    def _require_text(self, module: LanguageModule) -> None:
        for batch_size, length in step_shapes(self.steps):
            module.data.require_batch(batch_size, length, key="schedule.table")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find out what fits, now that the network is on its device."""
        assert isinstance(pl_module, LanguageModule)
        for line in self.other_sizes(trainer.world_size):
            pl_module.print(f"schedule.table: {line}")
        if not self.steps or self.micro_batch_tokens != "auto":
            return
        longest = max(stage.sequence_length for stage in self.steps.stages)
        most = max(self.steps[stage.first_step].tokens() for stage in self.steps.stages)
        with trainer.precision_plugin.forward_context():
            tokens = fitting_tokens(pl_module.net, longest, most, pl_module.device)
        tokens = trainer.strategy.broadcast(tokens)  # one plan for all devices
        self._plan(trainer, pl_module, tokens)
        self._require_text(pl_module)
        pl_module.print(f"schedule.micro_batch_tokens: auto: {tokens:,}")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise InputError if a resumed run is at another place than the table says."""
        assert isinstance(pl_module, LanguageModule)
        step, seen = trainer.global_step, pl_module.tokens_seen
        if 0 < step < len(self.steps) and (planned := self.steps[step].first_token) != seen:
            raise InputError(
                f"schedule.table: it has {planned:,} tokens before step {step + 1}, but the "
                f"checkpoint has seen {seen:,}; resume with the table and the devices of its run"
            )
        super().on_train_start(trainer, pl_module)

    def next_step(self, trainer: L.Trainer, module: LanguageModule) -> dict[str, int]:
        """Shape of the next step; also sets its learning rates, momentum, and second loss."""
        if trainer.global_step >= len(self.steps):  # no table, or its end
            return {}
        step = self.steps[trainer.global_step]
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] * step.lr
            if step.momentum is not None and "momentum" in group:
                group["momentum"] = step.momentum
        if step.vocab_loss is not None and (weight := module.net.vocab_loss_weight) is not None:
            weight.fill_(step.vocab_loss)
        return {
            "micro_batches": step.micro_batches,
            "batch_size": step.batch_size,
            "sequence_length": step.sequence_length,
        }
