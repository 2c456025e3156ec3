"""A run that diverges stops, says so, and spoils nothing."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import QUICKSTART
from helpers import SaveAfter, fit

from hlbgpt.callbacks import LastCheckpoint, StopOnDivergence, TimeToTarget
from hlbgpt.runs.checkpoint_io import load_checkpoint
from hlbgpt.utils.errors import DivergedError


class Poison(L.Callback):
    """Makes the loss, or only the gradient, of some steps a number that is none."""

    def __init__(self, *steps: int, loss: bool = True, value: float = float("nan")) -> None:
        self.steps, self.loss, self.value = steps, loss, value

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._poison(trainer, pl_module)

    on_train_start = on_train_batch_end

    def _poison(self, trainer: Any, pl_module: Any) -> None:
        now = trainer.global_step + 1 in self.steps
        for parameter in pl_module.net.parameters():
            parameter._backward_hooks = None
        if not hasattr(self, "forward"):
            self.forward = pl_module.net.forward
        pl_module.net.forward = self.bad if now else self.forward

    def bad(self, *tokens: Any, **how: Any) -> Any:
        loss = self.forward(*tokens, **how)
        if how:  # an evaluation
            return loss
        return loss * self.value if self.loss else _BadGradient.apply(loss, self.value)


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, value: float) -> torch.Tensor:
        ctx.value = value
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] * ctx.value, None


@pytest.mark.parametrize("loss", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_run_stops_within_a_logging_interval(
    folder: Path, tmp_path: Path, loss: bool, value: float, micro_batches: int
) -> None:
    steps: list[int] = []

    class Count(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
            steps.append(trainer.global_step + 1)

    with pytest.raises(DivergedError) as stop:
        fit(
            folder,
            tmp_path,
            Poison(12, loss=loss, value=value),
            Count(),
            TimeToTarget(target=0.1),
            SaveAfter(10),
            StopOnDivergence(),
            max_steps=40,
            val_check_interval=50,
            log_every_n_steps=5,
            micro_batches=micro_batches,
            lr=0.1,
        )
    assert steps[-1] <= 15
    message = str(stop.value)
    bad = 12 if loss else 13  # a gradient shows in the next loss
    assert f" at step {bad}; the last finite loss was " in message
    assert f" at step {bad - 1}; " in message
    assert f"the last good checkpoint is {tmp_path}/checkpoints/last.ckpt" in message
    assert not (tmp_path / "record.json").exists()
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 10
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_a_bad_last_step_leaves_no_record(folder: Path, tmp_path: Path) -> None:
    """Its gradient is looked at by nobody, but the validation of the final weights is."""
    callbacks = [TimeToTarget(target=0.1), LastCheckpoint(), StopOnDivergence()]
    with pytest.raises(DivergedError, match=r"val_loss is nan at step 8; .* was .* at step 8"):
        fit(folder, tmp_path, Poison(8, loss=False), *callbacks, max_steps=8, log_every_n_steps=50)
    assert not (tmp_path / "record.json").exists()


def test_weights_that_are_no_numbers_are_never_kept(folder: Path, tmp_path: Path) -> None:
    """Whoever leaves out the callback that stops."""
    with pytest.raises(DivergedError, match=r"weights are not finite at step 6; .* still holds"):
        fit(folder, tmp_path, Poison(5), SaveAfter(4, 6))
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 4


def test_one_line_on_the_command_line(hlbgpt: Any, tiny: list[str], capfd: Any) -> None:
    rates = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e30"]
    schedule = ["--model.lr_scheduler=null"]
    with pytest.raises(SystemExit) as stop:
        hlbgpt("fit", *QUICKSTART, *tiny, *rates, *schedule, "--trainer.max_steps=20")
    assert stop.value.code == 1
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.splitlines()[-1].startswith("hlbgpt: error: diverged: ")
    assert "target" not in captured.out
    assert not list(Path().rglob("record.json"))
