"""A run that is stopped and resumed ends as if it had never stopped."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from crash_test import curves, difference
from helpers import open_logger, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import MAX_STEPS, RECIPES

from hlbgpt.callbacks import LastCheckpoint, TimeToTarget
from hlbgpt.data import TextFiles, TokenDataModule
from hlbgpt.models import GPT, Network
from hlbgpt.runs import load_checkpoint
from hlbgpt.runs.folder import last_checkpoint
from hlbgpt.training.module import LanguageModule
from hlbgpt.training.resume import progress


class Noisy(GPT):
    """Draws from every random generator in training, so that losing one's state shows."""

    def forward(self, tokens: Any, targets: Any = None, **how: Any) -> Any:
        if self.training:
            share = 0.05 * (1 + random.random() + np.random.rand())
            tokens = torch.where(torch.rand(tokens.shape, device=tokens.device) < share, 0, tokens)
        return super().forward(tokens, targets, **how)


def noisy() -> Network:
    return Noisy(vocab_size=256, max_sequence_length=32, width=16, num_heads=2, num_blocks=2)


class StopError(Exception):
    """The end of a process, for a test."""


class StopAfter(L.Callback):
    """Saves a checkpoint as `LastCheckpoint` does, after step `step` and its validation.

    Stops `beyond` steps later. It is the last of the callbacks.
    """

    def __init__(self, step: int, path: Path, beyond: int = 0) -> None:
        self.step, self.path, self.last_step = step, path, step + beyond

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.ends_step and not pl_module.validation_due:
            self.stop(trainer)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.stop(trainer)

    def stop(self, trainer: L.Trainer) -> None:
        if trainer.sanity_checking:
            return
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path, weights_only=False)
        if trainer.global_step == self.last_step:
            raise StopError


def run(
    folder: Path,
    place: Path,
    *callbacks: L.Callback,
    resume: Path | None = None,
    precision: str = "32-true",
    compiled: bool = False,
    growth: float = 0.3,
    lr: float = 0.02,
    recipe: str = "baseline",
    micro_batches: int = 1,
    max_tokens: int | None = None,
    build: Callable[[], Network] = noisy,
    **arguments: Any,
) -> tuple[L.Trainer, LanguageModule]:
    """Train a small network over three short epochs; 16 micro-batches an epoch."""
    L.seed_everything(5, verbose=False)
    optimizer, scheduler, grow = RECIPES[recipe](lr, growth)
    module = LanguageModule(build(), optimizer, scheduler, compile=compiled)
    data = TokenDataModule(
        TextFiles(folder=str(folder)),
        "bytes",
        cache_dir=str(place.parent / "cache"),
        sequence_length=32,
        micro_batch_size=8,
        micro_batches=micro_batches,
        max_tokens=max_tokens,
        eval_sequence_length=32,
        eval_batch_size=64,
    )
    logger = open_logger(place, *(progress(load_checkpoint(resume)) if resume else ()))
    settings: dict[str, Any] = {
        "max_steps": MAX_STEPS,
        "limit_val_batches": 1.0,
        "val_check_interval": 5,
        "num_sanity_val_steps": 1,
        "log_every_n_steps": 1,
        "precision": precision,
        "logger": logger,
        "callbacks": [TimeToTarget(target=-1.0, verbose=False), *grow, *callbacks],
        "default_root_dir": place,
    }
    run = trainer(place, **(settings | arguments))
    run.fit(module, data, ckpt_path=resume)
    return run, module


def state_of(run: L.Trainer, module: LanguageModule) -> dict[str, Any]:
    """All that training has made, as plain values and tensors."""
    return {
        "weights": module.state_dict(),
        "optimizer": run.optimizers[0].state_dict(),
        "scheduler": [config.scheduler.state_dict() for config in run.lr_scheduler_configs],
        "loader": module.train_loader.state_dict(),
        "tokens": module.tokens_seen,
        "step": run.global_step,
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
    }


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal to the last bit."""
    assert difference(ours, theirs, where) is None


@pytest.fixture(scope="module")
def folder(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text so short that a run makes several passes over it."""
    folder = tmp_path_factory.mktemp("short")
    for split, size in {"train": 4300, "valid": 5000, "test": 1000}.items():
        (folder / f"wiki.{split}.raw").write_text(text[:size])
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that was never stopped, for each kind asked for: its state and its curves."""
    known: dict[str, Any] = {}

    def get(**kind: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        key = repr(kind)
        if key not in known:
            place = tmp_path_factory.mktemp("whole") / "run"
            known[key] = state_of(*run(folder, place, **kind)), curves(place)
        return known[key]

    return get


def stop_and_resume(
    folder: Path, place: Path, stops: list[int], beyond: int = 0, **kind: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train and save after each step of `stops`, with an interruption `beyond` steps later.

    Returns state and curves at the end.
    """
    path, resume = place / "stop.ckpt", None
    for step in stops:
        with pytest.raises(StopError):
            run(folder, place, StopAfter(step, path, beyond), resume=resume, **kind)
        resume = path
    done = run(folder, place, resume=resume, **kind)
    return state_of(*done), curves(place)


KINDS: dict[str, dict[str, Any]] = {
    "batch growth": {},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "four micro-batches": {"growth": 0.0, "micro_batches": 4},
    "Lightning's accumulation": {"growth": 0.0, "accumulate_grad_batches": 3},
    "validation after each step": {"growth": 0.0, "val_check_interval": 1},
    "every third step logged": {"log_every_n_steps": 3, "lr": 0.01},
    "hlb041": {"recipe": "hlb041"},
    "speedrun": {"recipe": "speedrun"},
}


@pytest.mark.parametrize("step", range(1, MAX_STEPS))
def test_resume_is_exact_after_every_step(
    folder: Path, tmp_path: Path, whole: Any, step: int
) -> None:
    state, lines = whole()
    assert len(lines["loss/train_loss"]) == MAX_STEPS
    assert [at for at, _ in lines["loss/val_loss"]] == [5, 10, 14]
    assert max(size for _, size in lines["schedule/micro_batches_per_step"]) >= 3
    resumed, continued = stop_and_resume(folder, tmp_path / "run", [step])
    assert_same(state, resumed)
    assert_same(lines, continued)


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact_in_every_kind_of_run(
    folder: Path, tmp_path: Path, whole: Any, kind: str
) -> None:
    """Stopped five times; after steps with a validation and without, at each sequence length."""
    state, lines = whole(**KINDS[kind])
    if "recipe" in KINDS[kind]:
        assert {length for _, length in lines["schedule/sequence_length"]} == {8, 16, 32}
        assert max(size for _, size in lines["schedule/micro_batches_per_step"]) >= 3
    resumed, continued = stop_and_resume(folder, tmp_path / "run", [2, 5, 6, 10, 12], **KINDS[kind])
    assert_same(state, resumed)
    assert_same(lines, continued)


def test_steps_that_are_made_again_are_in_the_curves_once(
    folder: Path, tmp_path: Path, whole: Any
) -> None:
    """Killed three times, each time some steps after its last checkpoint."""
    state, lines = whole()
    assert len(lines["loss/val_loss_by_tokens"]) == len(lines["loss/val_loss"]) == 3
    assert [value for _, value in lines["loss/train_loss_by_tokens"]] == [
        value for _, value in lines["loss/train_loss"]
    ]
    resumed, continued = stop_and_resume(folder, tmp_path / "run", [3, 5, 9], beyond=4)
    assert_same(state, resumed)
    assert_same(lines, continued)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_resume_is_exact_when_compiled(
    folder: Path, tmp_path: Path, whole: Any, precision: str
) -> None:
    kind = {"compiled": True, "precision": precision}
    state, lines = whole(**kind)
    resumed, continued = stop_and_resume(folder, tmp_path / "run", [4, 10], **kind)
    assert_same(state, resumed)
    assert_same(lines, continued)


@pytest.mark.slow
@settings(max_examples=60)
@given(
    stops=st.sets(st.integers(1, MAX_STEPS - 1), min_size=1, max_size=3),
    micro_batches=st.integers(1, 5),
    interval=st.integers(1, 9),
)
def test_resume_is_exact_for_any_stops(
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    whole: Any,
    stops: set[int],
    micro_batches: int,
    interval: int,
) -> None:
    kind = {"micro_batches": micro_batches, "val_check_interval": interval}
    state, lines = whole(**kind)
    place = tmp_path_factory.mktemp("stopped") / "run"
    resumed, continued = stop_and_resume(folder, place, sorted(stops), **kind)
    assert_same(state, resumed)
    assert_same(lines, continued)


@pytest.mark.parametrize("end", [{"max_steps": 7}, {"max_tokens": 7 * 8 * 32}], ids=str)
def test_a_finished_run_is_taken_further_exactly(
    folder: Path, tmp_path: Path, whole: Any, end: dict[str, Any]
) -> None:
    """Its last checkpoint was saved at the end of training."""
    state, _ = whole(growth=0.0)
    place = tmp_path / "run"
    half, _ = run(folder, place, LastCheckpoint(), growth=0.0, **end)
    assert half.global_step == 7
    resumed = run(folder, place / "on", resume=last_checkpoint(place), growth=0.0)
    assert_same(state, state_of(*resumed))
