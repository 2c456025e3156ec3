"""The LightningModule: steps, compilation, optimizer, and what is logged."""

import math
import sys
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion, OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from hlbgpt.data import TokenDataModule
from hlbgpt.generation.sampling import Generation, continue_texts
from hlbgpt.models import Network
from hlbgpt.models.base import token_scores
from hlbgpt.optim import parameter_groups
from hlbgpt.runs.checkpoint import WholeCheckpointIO, require_matching
from hlbgpt.runs.logger import SECONDS, TOKENS, CurveLogger
from hlbgpt.training import resume
from hlbgpt.training.compilation import compile_in_place, warm_up
from hlbgpt.training.metrics import StepLog, grad_norm
from hlbgpt.training.steps import StepPlan
from hlbgpt.training.throughput import Throughput
from hlbgpt.utils.clock import Stopwatch
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.hardware import card_of
from hlbgpt.utils.seed import run_seed

_SPLIT_OF_PREFIX = {"val": "validation", "test": "test"}


class LanguageModule(L.LightningModule):
    """Trains a network on batches of tokens and measures it.

    Args:
        net: The network: `hlbgpt.models.GPT`, or a class of your own from `hlbgpt.models.Network`.
        optimizer: Optimizer, given the parameter groups of `hlbgpt.optim.muon`.
        lr_scheduler: Learning-rate schedule, stepped once an optimizer step; none by default.
        compile: Whether to run the network through `torch.compile`.
        log_norms: Whether to log norms of gradients and updates for each parameter group; in the
            steps that are logged, the weights are kept twice.
        generation: How `predict` continues a prompt.
    """

    def __init__(
        self,
        net: Network,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        compile: bool = True,  # noqa: A002
        log_norms: bool = True,
        generation: Generation = Generation(),  # noqa: B008 (never changed)
    ) -> None:
        super().__init__()
        self.net = net
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.compile_net, self.generation = compile, generation
        # In double precision, so that the sum does not depend on how it is cut into batches.
        self.eval_loss = MeanMetric().set_dtype(torch.float64)
        self.eval_accuracy = MeanMetric().set_dtype(torch.float64)
        self.compile_seconds = 0.0
        self.throughput = Throughput()
        self.clock = Stopwatch()  # of training, run by `TimeToTarget`
        self.step_log = StepLog(log_norms)
        self.steps = StepPlan()
        self.train_shapes: list[tuple[int, int]] = []  # set by callbacks that change it
        self._logged: tuple[int, dict[str, Any]] = (0, {})  # after how many steps, and what
        self._accumulate = 1  # the setting, which `steps` overwrites in the trainer
        self._hyperparameters: dict[str, str] = {}  # of the optimizer and its schedule
        self._resumed: dict[str, Any] | None = None  # until training goes on

    # --- set-up -------------------------------------------------------------------------------

    @property
    def data(self) -> TokenDataModule:
        """The run's datamodule."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, TokenDataModule):
            raise InputError(
                f"datamodule: {type(data).__name__} given; LanguageModule needs a TokenDataModule"
            )
        return data

    def setup(self, stage: str) -> None:
        """Raise InputError where network and data do not fit."""
        self._accumulate = self.steps.micro_batches = self.trainer.accumulate_grad_batches
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not chosen by the user
            self.trainer.strategy.checkpoint_io = WholeCheckpointIO()
        if self.trainer.strategy.root_device.type == "mps":  # has no double precision
            self.eval_loss.set_dtype(torch.float32)
            self.eval_accuracy.set_dtype(torch.float32)
        logits, tokens = self.net.vocab_size, self.data.vocab_size
        if logits < tokens:
            raise InputError(
                f"model.net vocab_size: {logits} is less than the {tokens} tokens of "
                f"data.tokenizer {self.data.tokenizer}; raise it"
            )
        if (longest := self.net.max_sequence_length) is None:
            return
        keys = {"fit": ["sequence_length"], "predict": []}.get(stage, [])
        keys += [] if stage == "predict" else ["eval_sequence_length"]
        for key in keys:
            if (length := getattr(self.data, key)) > longest:
                raise InputError(
                    f"data.{key}: {length} is longer than the network's context "
                    f"(max_sequence_length {longest}); lower it or give the network more"
                )

    def configure_model(self) -> None:
        """Compile in place, which leaves the names in checkpoints as they are."""
        if not self.compile_net or self.trainer.predicting:
            return
        compile_in_place(self.net, self.trainer.strategy.root_device)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer, scheduler = self._build_optimizer()
        self._hyperparameters = resume.hyperparameters(optimizer, scheduler)
        if scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _build_optimizer(self) -> tuple[Optimizer, LRSchedulerTypeUnion | None]:
        key = "model.optimizer"
        try:
            optimizer = self.optimizer(parameter_groups(self.net))
            if self.lr_scheduler is None:
                for group in optimizer.param_groups:  # what the token schedule multiplies
                    group["initial_lr"] = group["lr"]
                return optimizer, None
            key = "model.lr_scheduler"
            scheduler = self.lr_scheduler(optimizer)
        except (ValueError, TypeError) as error:
            raise InputError(f"{key}: {error}; change its init_args") from error
        planned, steps = getattr(scheduler, "total_steps", None), self.trainer.max_steps
        if planned is not None and not 0 < steps <= planned:
            raise InputError(
                f"trainer.max_steps: {steps} steps asked for, but the learning-rate schedule ends "
                f"at total_steps {planned}; set both to the same number"
            )
        return optimizer, scheduler

    def on_fit_start(self) -> None:
        card = card_of(self.device)
        self.throughput.peak = card.flops * self.trainer.world_size if card else None
        train, data = self.data.files["train"].header, self.data
        step = data.micro_batch_size * data.sequence_length * self.trainer.world_size
        parameters = sum(parameter.numel() for parameter in self.net.parameters())
        self.print(
            f"{type(self.net).__name__}: {parameters:,} parameters; train split: {train.tokens:,} "
            f"tokens ({train.tokenizer}); micro-batch: {step:,} tokens; {self.trainer.precision}"
        )
        data.place_tokens(self.device)
        if self.compile_net:
            with self.trainer.precision_plugin.forward_context():
                self.compile_seconds += warm_up(
                    self.net,
                    train_shapes=self.train_shapes
                    or [(data.micro_batch_size, data.sequence_length)],
                    eval_shape=(data.eval_batch_size, data.eval_sequence_length),
                    device=self.device,
                )

    # --- training -----------------------------------------------------------------------------

    @property
    def tokens_seen(self) -> int:
        """Tokens trained on, on all devices."""
        return self.throughput.tokens

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the steps to come, for callbacks to set between steps."""
        return self.steps.micro_batches

    @micro_batches.setter
    def micro_batches(self, number: int) -> None:
        self.steps.micro_batches = number

    def on_train_start(self) -> None:
        self.steps.begin_run(self.trainer)
        if self._resumed is None and self.net.wants_token_counts:
            # On the clock, as all that is learned or counted from the training text.
            self.net.use_token_counts(self.data.token_counts().to(self.device))
        if self._resumed is not None:
            self._continue(self._resumed)
            self._resumed = None
        self.throughput.begin()

    def _continue(self, state: dict[str, Any]) -> None:
        """Take up what `on_save_checkpoint` found; now, for the set-up is over."""
        self.steps.load_state_dict(state["steps"], self.device)
        if state["accumulate_grad_batches"] == self._accumulate:
            self.micro_batches = state["steps"]["micro_batches"]
        resume.restore_gradients(self.net, state["gradients"])
        resume.continue_loops(self.trainer, self.steps)
        again = self.trainer.global_step - state["log_step"]  # 1 if the last step's come again
        for logger in self.loggers:
            if isinstance(logger, CurveLogger):
                logger.cut_back(self.tokens_seen + 1 - again)
        if state["log"]:
            self._logged = self.trainer.global_step, state["log"]
            values = {**state["log"], "epoch": self.trainer.current_epoch}
            self.trainer._logger_connector.log_metrics(values, step=state["log_step"])
        if state["seed"] == run_seed():
            resume.restore_random_state(state["random"], self.global_rank, self.device)

    def on_train_epoch_start(self) -> None:
        self.micro_batches = self.trainer.accumulate_grad_batches

    def on_train_epoch_end(self) -> None:
        self.trainer.accumulate_grad_batches = self.micro_batches

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.steps.begin_batch(self.trainer, batch_idx)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch[:, :-1], batch[:, 1:])
        self.steps.sequence_length = length = batch.shape[1] - 1
        self.steps.micro_batch_tokens = len(batch) * length * self.trainer.world_size
        self.steps.losses.append(loss.detach())
        self.throughput.add(self.net, self.steps.micro_batch_tokens, length)
        # Lightning divides by accumulate_grad_batches, which here is where the step ends.
        return loss * (self.trainer.accumulate_grad_batches / self.steps.size)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, then drop the gradients.

        Lightning drops them where the batch's number is a multiple of `accumulate_grad_batches`,
        which is used here in another way (see `StepPlan`).
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        call._call_callback_hooks(self.trainer, "on_before_zero_grad", optimizer)
        self._log_step(self.step_log.of_update(self.trainer.optimizers[0]))
        optimizer.zero_grad()

    def skip_step(self) -> None:
        """Leave the current step out; to be called before the optimizer steps."""
        self.steps.skipped = True
        self.net.zero_grad(set_to_none=True)

    @property
    def step_loss(self) -> Tensor:
        """Mean loss of the step's micro-batches so far, in nats; a scalar on the device."""
        return self.steps.mean_loss

    def grad_norm(self) -> Tensor:
        """Norm of all gradients taken as one vector; a scalar on the device."""
        return grad_norm(list(self.net.parameters()))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        interval: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (self.trainer.global_step + 1) % interval or self.steps.skipped:
            return
        self._logged = self.trainer.global_step + 1, {}
        self._log_step(
            {
                "train_loss": self.step_loss,
                "grad_norm": self.grad_norm(),
                **self._progress(),
                "step_tokens": float(self.steps.size * self.steps.micro_batch_tokens),
                "micro_batches_per_step": float(self.steps.size),
                "sequence_length": float(self.steps.sequence_length),
                **self.step_log.of_gradients(optimizer),
                **self.throughput.rates(),
            }
        )

    def _log_step(self, values: dict[str, Any]) -> None:
        self.log_dict(values)
        self._logged[1].update(values)

    def _progress(self) -> dict[str, float]:
        """Where the run is, so that every logged loss has its place on these axes too."""
        return {TOKENS: float(self.tokens_seen), SECONDS: self.clock.seconds}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for logger in self.loggers:  # the curves on disk reach at least as far as the checkpoint
            logger.save()
        loops, steps = checkpoint["loops"]["fit_loop"], self.trainer.global_step
        # Then the curves are to be cut back to before this step, and its values logged again.
        again = resume.repeats_log(loops, self.steps)
        resume.settle_loops(loops)
        step, values = self._logged
        checkpoint[resume.KEY] = {
            "log_step": steps - again,
            "log": _floats(values) if again and step == steps else {},
            **self.throughput.state_dict(),
            "seed": run_seed(),
            "random": resume.random_states(self.device),
            "steps": self.steps.state_dict(),
            "accumulate_grad_batches": self._accumulate,
            "gradients": resume.partial_gradients(self.net, self.trainer.strategy),
            "hyperparameters": self._hyperparameters,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        require_matching(self, checkpoint, "the checkpoint")
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        resume.require_resumable(checkpoint)
        self._resumed = checkpoint[resume.KEY]
        self.throughput.load_state_dict(self._resumed)
        for line in resume.keep_typed(checkpoint, *self._build_optimizer()):
            self.print(f"resume: {line}")

    # --- evaluation ---------------------------------------------------------------------------

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._measure(batch)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self._measure(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")
        if not self.trainer.sanity_checking:
            self.steps.validation_due = False

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def on_validation_end(self) -> None:
        self.throughput.restart()

    def _measure(self, batch: Tensor) -> None:
        scores, counted = token_scores(self.net, batch), batch[:, 1:] >= 0
        self.eval_loss.update(scores.loss, counted)
        self.eval_accuracy.update(scores.correct, counted)

    def _log_evaluation(self, prefix: str) -> None:
        """Log loss, perplexity, bits per byte and accuracy of the whole split."""
        loss, accuracy = self.eval_loss.compute(), self.eval_accuracy.compute()
        self.eval_loss.reset()
        self.eval_accuracy.reset()
        split = self.data.files[_SPLIT_OF_PREFIX[prefix]].header
        bits = loss * (split.tokens - 1) / math.log(2) / split.text_bytes
        values = {"perplexity": loss.exp(), "bits_per_byte": bits, "accuracy": accuracy}
        if self.trainer.state.fn == "fit":
            self.log_dict(self._progress())
        self.log(f"{prefix}_loss", loss, prog_bar=True)
        self.log_dict({f"{prefix}_{name}": value for name, value in values.items()})

    # --- generation ---------------------------------------------------------------------------

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> list[str]:
        """Continue prompts, (t,) each; prints the texts and returns them."""
        return continue_texts(self.net, batch, self.generation, self.data.encoding, self._write)

    def _write(self, piece: str) -> None:
        self.print(piece, end="")
        sys.stdout.flush()  # a progress bar's print takes no `flush`


def _floats(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
