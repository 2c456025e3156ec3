"""The LightningModule: network, optimizer, evaluation, and what is logged; see `step.py` too."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from hlbgpt.data import StepLoader, TokenDataModule
from hlbgpt.generation import SamplingConfig, continue_prompts
from hlbgpt.models import Network, checkpoint_blocks
from hlbgpt.optim.build import build_optimizer
from hlbgpt.runs import SECONDS, TOKENS, AtomicCheckpointIO, require_matching_weights
from hlbgpt.training import checks, compilation, evaluation, fsdp, resume, step, step_metrics
from hlbgpt.training.throughput import Throughput
from hlbgpt.utils.clock import Stopwatch


class LanguageModule(step.MicroBatchedModule):
    """Trains a network on tokens and measures it. A batch is one optimizer step.

    Args:
        net: The network: `hlbgpt.models.GPT`, `FastGPT`, `HLB041`, or your own subclass of
            `hlbgpt.models.Network`.
        optimizer: Optimizer, given the parameter groups of `hlbgpt.optim.parameter_groups`.
        lr_scheduler: Learning-rate schedule, stepped after each optimizer step; none by default.
        compile: Whether to run the network through `torch.compile`.
        activation_checkpointing: Whether to keep only the inputs of each block for the backward
            pass, and compute the rest again there: about a third more work, and far less memory.
        log_norms: Whether to log the norms of gradients and updates by parameter group. In logged
            steps this takes the memory of a second copy of the weights.
        sampling: How `predict` continues a prompt.

    Attributes:
        clock: Training time; the callback `TimeToTarget` runs it.
        clock_due: Whether the clock is to go on once a validation is over.
        checkpoint_clock: Time spent on saving checkpoints, which is no training time.
        last_logged: Values of the last training step that was logged.
        measured: What the last evaluation measured, see `hlbgpt.training.evaluation.coverage`.
        train_texts: Fingerprints of the texts trained on, one unless the run was resumed with
            another.
        train_shapes: Each (B, T) that micro-batches will have, to be compiled before training.
    """

    net: Network

    def __init__(
        self,
        net: Network,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        compile: bool = True,  # noqa: A002
        activation_checkpointing: bool = False,
        log_norms: bool = True,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (never changed)
    ) -> None:
        super().__init__()
        self.net = net
        if activation_checkpointing:
            checkpoint_blocks(net)
        # Functions, which are not copied with the module: what makes an optimizer may not be.
        self.optimizer = lambda groups: optimizer(groups)
        self.lr_scheduler = lr_scheduler and (lambda made: lr_scheduler(made))
        self.compile_net, self.compile_seconds, self.sampling = compile, 0.0, sampling
        self.clock, self.checkpoint_clock, self.clock_due = Stopwatch(), Stopwatch(), False
        self.train_shapes: list[tuple[int, int]] = []
        self.evaluation = evaluation.Evaluation()
        self.throughput = Throughput()
        self.step_metrics = step_metrics.StepMetrics(log_norms)
        self.last_logged: dict[str, float] = {}
        self.measured: dict[str, Any] = {}
        self.train_texts: list[str] = []
        self._step_values: dict[str, Any] = {}  # to be logged once the step is made
        self._resume_state: dict[str, Any] | None = None  # until training continues
        self._fitting = False
        self._empty_net: tuple[Network, ...] = ()  # where FSDP2 has split the network's weights

    # --- set-up -------------------------------------------------------------------------------

    @property
    def data(self) -> TokenDataModule:
        """The run's datamodule."""
        return checks.datamodule_of(self.trainer)

    @property
    def train_loader(self) -> StepLoader:
        """The loader of training batches, whose next step can be set; during training."""
        assert isinstance(self.trainer.train_dataloader, StepLoader)
        return self.trainer.train_dataloader

    def setup(self, stage: str) -> None:
        """Raise InputError where network, data and trainer do not fit together."""
        self._fitting = stage == "fit"
        checks.require_fitting_together(stage, self.trainer, self.net, self.data)
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:  # the default, not a user's choice
            strategy.checkpoint_io = AtomicCheckpointIO()
        if self._fitting:
            self.train_texts = [self.data.train_fingerprint]
            if self.compile_net:
                checks.require_static_shapes(self.net)
            if self.net.needs_spelling:
                self.net.init_from_spelling(self.data.encoding.spelling())
            if strategy.root_device.type == "cuda":  # not those of an earlier run
                torch.cuda.reset_peak_memory_stats(strategy.root_device)
        if strategy.root_device.type == "mps":  # has no double precision
            self.evaluation.sum_dtype = torch.float32

    def configure_model(self) -> None:
        """Compile and split in place, which leaves the names in checkpoints as they are."""
        strategy = self.trainer.strategy
        if self.compile_net and not self.trainer.predicting:
            compilation.compile_in_place(self.net, strategy.root_device, self.data.cache_dir)
        if isinstance(strategy, fsdp.FSDP2Strategy) and not self._empty_net:
            self._empty_net = (fsdp.split(self.net, strategy.data_mesh),)

    @contextlib.contextmanager
    def whole_net(self, *, keep_changes: bool = False) -> Iterator[Network]:
        """The network with all its weights, which some ranks may run alone; all must enter.

        With FSDP2 it is a copy; see `hlbgpt.training.fsdp.gathered`.
        """
        if not self._empty_net:
            yield self.net
            return
        with fsdp.gathered(self.net, *self._empty_net, keep_changes=keep_changes) as net:
            yield net

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer, scheduler = build_optimizer(self.net, self.optimizer, self.lr_scheduler)
        checks.require_clipping_works(self.trainer, optimizer)
        if scheduler is None:
            return optimizer
        checks.require_schedule_length(getattr(scheduler, "total_steps", None), self.trainer)
        by_step: LRSchedulerConfigType = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": by_step}

    def on_fit_start(self) -> None:
        self.throughput.set_peak(self.device, self.trainer.world_size)
        self.print(checks.summary(self.trainer, self.net, self.data))
        if not self.compile_net:
            return
        train = self.train_shapes or [(self.data.device_batch[1], self.data.sequence_length)]
        evaluation = self.data.eval_batch_size, self.data.eval_sequence_length
        with self.trainer.precision_plugin.forward_context():
            self.compile_seconds += compilation.warm_up(
                self.net, train_shapes=train, eval_shape=evaluation, device=self.device
            )
        self.compile_seconds += compilation.warm_up_optimizer(self.trainer.optimizers[0])

    def on_train_start(self) -> None:
        if self._resume_state is not None:
            self._resume(self._resume_state)
        else:
            self._count_text()
        self.throughput.begin()

    def _count_text(self) -> None:
        """On the clock, as all that is learned or counted from the training text."""
        if self.net.needs_token_counts:
            counts = self.train_loader.token_counts(self.data.vocab_size).to(self.device)
            counts = self.trainer.strategy.reduce(counts, reduce_op="sum")
            with self.whole_net(keep_changes=True):
                self.net.init_from_token_counts(counts)
        if self.net.needs_text:
            loader = self.train_loader
            self.net.init_from_text(
                lambda overlap: (chunk.to(self.device) for chunk in loader.text_chunks(overlap))
            )

    # --- training; the step itself is in step.py ----------------------------------------------

    @property
    def tokens_seen(self) -> int:
        """Tokens trained on, on all devices, with those of the current step."""
        return self.throughput.tokens

    @property
    def step_tokens(self) -> int:
        """Tokens of the last step, on all devices."""
        accumulated: int = self.trainer.accumulate_grad_batches
        return self.throughput.batch_tokens * accumulated

    def is_last_step(self, step: int) -> bool:
        """Whether training ends with this step, by `trainer.max_steps` or `data.max_tokens`."""
        enough = self.data.max_tokens is not None and self.tokens_seen >= self.data.max_tokens
        return enough or super().is_last_step(step)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        tokens = batch[..., 1:].numel() * self.trainer.world_size
        self.throughput.add(self.net, tokens, batch.shape[-1] - 1)
        super().on_train_batch_start(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (self.trainer.global_step + 1) % every:
            return
        micro_batches, _, length = self.step_shape
        self._step_values = {
            "train_loss": self.step_loss,
            "grad_norm": step_metrics.grad_norm(list(self.net.parameters())),
            "step_tokens": self.step_tokens,
            "micro_batches_per_step": micro_batches,
            "sequence_length": length,
            **self.step_metrics.before_step(optimizer),
            **self.throughput.rates(),
        }
        self.log("train_loss", self._step_values["train_loss"], logger=False)  # to be monitored

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if values := self._step_values:
            self._step_values = {}
            updates = self.step_metrics.after_step(self.trainer.optimizers[0])
            self.last_logged = self.log_step(self.trainer.global_step, {**values, **updates})

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        if self.ends_step and self.is_last_step(self.trainer.global_step):
            self.trainer.should_stop = True

    def on_validation_model_train(self) -> None:
        """Comes after all callbacks' `on_validation_end`, in which checkpoints are saved."""
        super().on_validation_model_train()
        if self.clock_due:
            self.clock_due = False
            self.clock.start()
        self.throughput.restart()

    def log_step(self, step: int, values: dict[str, Any]) -> dict[str, float]:
        """Log numbers and scalar tensors of a step, numbered from 0 as by Lightning; returns them.

        Straight to the loggers: the steps that `self.log` gives are not exact after a resume.
        """
        where = {TOKENS: self.tokens_seen, SECONDS: self.clock.seconds}
        floats = step_metrics.to_floats({**values, **where})
        for logger in self.loggers:
            logger.log_metrics(floats, step)
        return floats

    # --- resume -------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for logger in self.loggers:  # the curves on disk reach at least as far as the checkpoint
            logger.save()
        checkpoint[resume.KEY] = {
            **self.throughput.state_dict(),
            **resume.text_state(self.data, self.train_texts),
            "validated": self.validation_due,
            "random": resume.random_states(self.device),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        require_matching_weights(self, checkpoint, "the checkpoint")
        resume.require_same_tokenizer(checkpoint, self.data)
        if not self._fitting:
            return
        resume.require_training_state(checkpoint)
        for schedule in checkpoint["lr_schedulers"]:
            checks.require_schedule_length(schedule.get("total_steps"), self.trainer)
        self._resume_state = checkpoint[resume.KEY]
        self.throughput.load_state_dict(self._resume_state)
        self.train_texts = resume.train_texts(checkpoint, self.data)
        for split in resume.changed_texts(checkpoint, self.data):
            self.print(f"resume: the {split} split is another text than the checkpoint's")

    def _resume(self, state: dict[str, Any]) -> None:
        """Restore the rest, now that nothing of the set-up draws random numbers any more."""
        resume.require_fitting_state(self.trainer.optimizers[0])
        self._resume_state = None
        # Lightning asks before the first step, and skips a validation that was made already.
        self.validation_due = evaluation.schedule_validation(self.trainer, state["validated"])
        if self.is_last_step(self.trainer.global_step):
            self.trainer.should_stop = True
        resume.restore_random_state(state["random"], self.global_rank, self.device)

    @property
    def flops_per_batch(self) -> int:
        """FLOPs of the current batch on this device, for Lightning's `ThroughputMonitor`."""
        micro_batches, windows, length = self.step_shape
        passes = 3  # forward, and the backward pass, which takes twice as many
        if not self.trainer.training:
            windows, length = self.data.eval_batch_size, self.data.eval_sequence_length
            micro_batches = passes = 1
        forward = self.net.flops_per_token(length) / 3
        return round(passes * forward * micro_batches * windows * length)

    # --- evaluation and generation ------------------------------------------------------------

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, vocab_size) of tokens (B, T) int64."""
        return self.net(tokens)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.evaluation.update(self.net, batch)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("validation", "val")
        if self._fitting:  # callbacks have logged theirs before this hook
            checks.require_monitored_metrics(self.trainer)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test", "test")

    def _log_evaluation(self, split: str, prefix: str) -> None:
        header, length = self.data.files[split].header, self.data.eval_sequence_length
        found, self.measured = self.evaluation.finish(header, length)
        if not self._fitting and not self.measured["complete"]:
            self.print(f"measured on {evaluation.part_of_split(self.measured)} only")
        values = {f"{prefix}_{name}": value for name, value in found.items()}
        # For callbacks, and the table of `hlbgpt validate`.
        self.log_dict(values, logger=False if self._fitting else None)
        if self._fitting and not self.trainer.sanity_checking:
            self.log_step(self.trainer.global_step - 1, values)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> list[str]:
        """Continue prompts, (t,) int64 each; prints the texts and returns them."""
        with self.whole_net() as net:
            return continue_prompts(net, batch, self.sampling, self.data.encoding, self._write)

    def _write(self, piece: str) -> None:
        self.print(piece, end="")
        sys.stdout.flush()  # a progress bar's print takes no `flush`
