"""A run that is stopped and resumed ends as if it had never stopped."""

import random
from pathlib import Path
from typing import Any

import hypothesis
import lightning as L
import numpy as np
import pytest
import torch
from crash_test import curves, difference
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import MAX_STEPS, RECIPES
from test_module import trainer

from hlbgpt.callbacks import TimeToTarget
from hlbgpt.data import TextFiles, TokenDataModule
from hlbgpt.models import GPT
from hlbgpt.runs.logger import BY_TOKENS, CurveLogger
from hlbgpt.training.module import LanguageModule


class Noisy(GPT):
    """Draws from every random generator in training, so that losing one's state shows."""

    def forward(self, tokens: Any, targets: Any = None, **how: Any) -> Any:
        if self.training:
            share = 0.05 * (1 + random.random() + np.random.rand())
            tokens = torch.where(torch.rand(tokens.shape) < share, 0, tokens)
        return super().forward(tokens, targets, **how)


class StopError(Exception):
    """The end of a process, for a test."""


class StopAt(L.Callback):
    """Saves a checkpoint and stops when hook `hook` is called for the `count`-th time."""

    def __init__(self, hook: str, count: int, path: Path) -> None:
        self.left, self.path = count, path
        setattr(self, hook, self.stop)

    def stop(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.sanity_checking:
            return
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path, weights_only=False)
            raise StopError


def run(
    folder: Path,
    place: Path,
    *callbacks: L.Callback,
    resume: Path | None = None,
    precision: str = "32-true",
    compiled: bool = False,
    growth: float = 0.3,
    purge_step: int | None = None,
    lr: float = 0.02,
    recipe: str = "baseline",
    **arguments: Any,
) -> tuple[L.Trainer, LanguageModule]:
    """Train a small network over three short passes; 16 micro-batches a pass."""
    L.seed_everything(5, verbose=False)
    net = Noisy(vocab_size=256, max_sequence_length=32, width=16, num_heads=2, num_blocks=2)
    optimizer, scheduler, grow = RECIPES[recipe](lr, growth)
    module = LanguageModule(net, optimizer, scheduler, compile=compiled)
    data = TokenDataModule(
        TextFiles(folder=str(folder)),
        "bytes",
        cache_dir=str(place.parent / "cache"),
        sequence_length=32,
        micro_batch_size=8,
        eval_sequence_length=32,
        eval_batch_size=64,
    )
    logger = CurveLogger(place, name="", version="", default_hp_metric=False)
    if purge_step is not None:
        logger = CurveLogger(
            place, name="", version="", default_hp_metric=False, purge_step=purge_step
        )
    settings: dict[str, Any] = {
        "max_steps": MAX_STEPS,
        "limit_val_batches": 1.0,
        "val_check_interval": 5,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 1,
        "log_every_n_steps": 1,
        "precision": precision,
        "logger": logger,
        "callbacks": [TimeToTarget(target=0.1, verbose=False), *grow, *callbacks],
        "default_root_dir": place,
    }
    run = trainer(place, **(settings | arguments))
    run.fit(module, data, ckpt_path=resume)
    return run, module


def state_of(run: L.Trainer, module: LanguageModule) -> dict[str, Any]:
    """All that training has made, as plain values and tensors."""
    loader: Any = run.fit_loop._combined_loader
    return {
        "weights": module.state_dict(),
        "optimizer": run.optimizers[0].state_dict(),
        "scheduler": [config.scheduler.state_dict() for config in run.lr_scheduler_configs],
        "stream": loader.flattened[0].state_dict(),
        "tokens": module.tokens_seen,
        "epoch": run.current_epoch,
        "batches": run.fit_loop.epoch_loop.total_batch_idx,
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
    folder: Path,
    place: Path,
    stops: list[tuple[str, int]],
    missed_is_fine: bool = False,
    **kind: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train with interruptions, each saved by a callback in a hook; state and curves at the end."""
    path, resume, purge_step = place / "stop.ckpt", None, None
    for hook, count in stops:
        stop = StopAt(hook, count, path)
        try:
            done = run(folder, place, stop, resume=resume, purge_step=purge_step, **kind)
        except StopError:
            resume = path
            _number_events(place)
            checkpoint = torch.load(path, weights_only=True)
            purge_step = checkpoint["hlbgpt"]["log_step"]
            if checkpoint["global_step"] == kind.get("max_steps", MAX_STEPS):
                assert missed_is_fine  # nothing left to do
                hypothesis.reject()
        else:
            assert missed_is_fine
            return state_of(*done), curves(place)
    done = run(folder, place, resume=resume, purge_step=purge_step, **kind)
    return state_of(*done), curves(place)


def _number_events(place: Path) -> None:
    """Name event files in their order, which TensorBoard takes from their names.

    Runs of one process within a second are told apart by a counter that sorts 10 before 9.
    """
    for folder in (place, place / BY_TOKENS):
        files = sorted(folder.glob("events*"), key=lambda f: f.stat().st_mtime_ns)
        for number, file in enumerate(files):
            file.rename(folder / f"events.out.tfevents.0{number:03}")


HOOKS = {
    "on_train_batch_start": [2, 3, 17, 25],
    "on_train_batch_end": [1, 4, 5, 11, 16, 20],
    "on_validation_start": [1, 2],
    "on_validation_batch_end": [1, 2, 4],
    "on_validation_end": [1, 2, 3],
    "on_train_epoch_end": [1],
    "on_train_epoch_start": [2],
}


@pytest.mark.parametrize(
    ("hook", "count"), [(hook, count) for hook, counts in HOOKS.items() for count in counts]
)
def test_resume_is_exact_wherever_a_run_stops(
    folder: Path, tmp_path: Path, whole: Any, hook: str, count: int
) -> None:
    state, lines = whole()
    assert len(lines["loss/train_loss"]) == MAX_STEPS
    assert len(lines["loss/val_loss"]) >= 4
    assert max(size for _, size in lines["schedule/micro_batches_per_step"]) >= 3
    resumed, continued = stop_and_resume(folder, tmp_path / "run", [(hook, count)])
    assert_same(state, resumed)
    assert_same(lines, continued)


@pytest.mark.parametrize(
    "kind",
    [
        {"precision": "bf16-mixed"},
        {"growth": 0.0, "accumulate_grad_batches": 3},
        {"growth": 0.0, "val_check_interval": 1},
        {"check_val_every_n_epoch": 1, "val_check_interval": 0.5},
        {"log_every_n_steps": 3, "lr": 0.01},
    ],
    ids=str,
)
def test_resume_is_exact_in_every_kind_of_run(
    folder: Path, tmp_path: Path, whole: Any, kind: dict[str, Any]
) -> None:
    """Stopped four times, in other hooks each time."""
    stops = [
        ("on_train_batch_end", 7),
        ("on_validation_batch_end", 2),
        ("on_train_batch_start", 5),
        ("on_validation_end", 1),
    ]
    state, lines = whole(**kind)
    resumed, continued = stop_and_resume(folder, tmp_path / "run", stops, **kind)
    assert_same(state, resumed)
    assert_same(lines, continued)


@pytest.mark.parametrize("recipe", ["hlb041", "speedrun"])
def test_resume_is_exact_where_shapes_change(
    folder: Path, tmp_path: Path, whole: Any, recipe: str
) -> None:
    """Stopped in steps of each sequence length, in the middle of accumulation too."""
    state, lines = whole(recipe=recipe)
    assert {length for _, length in lines["schedule/sequence_length"]} == {8, 16, 32}
    assert max(size for _, size in lines["schedule/micro_batches_per_step"]) >= 3
    stops = [
        ("on_train_batch_end", 4),
        ("on_train_batch_start", 5),
        ("on_validation_end", 1),
        ("on_train_batch_end", 6),
        ("on_train_batch_end", 3),
    ]
    resumed, continued = stop_and_resume(folder, tmp_path / "run", stops, recipe=recipe)
    assert_same(state, resumed)
    assert_same(lines, continued)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_resume_is_exact_when_compiled(
    folder: Path, tmp_path: Path, whole: Any, precision: str
) -> None:
    kind = {"compiled": True, "precision": precision}
    state, lines = whole(**kind)
    stops = [("on_train_batch_end", 9), ("on_validation_batch_end", 1)]
    resumed, continued = stop_and_resume(folder, tmp_path / "run", stops, **kind)
    assert_same(state, resumed)
    assert_same(lines, continued)


def test_resume_just_before_the_last_batch_of_a_pass(
    folder: Path, tmp_path: Path, whole: Any
) -> None:
    """The next batch, already taken, is the last of its pass; the one before was not."""
    kind = {"accumulate_grad_batches": 1, "val_check_interval": 1}
    state, lines = whole(**kind)
    resumed, continued = stop_and_resume(
        folder, tmp_path / "run", [("on_train_batch_start", 16)], **kind
    )
    assert_same(state, resumed)
    assert_same(lines, continued)


@pytest.mark.slow
@settings(max_examples=60)
@given(
    stops=st.lists(
        st.tuples(st.sampled_from(sorted(HOOKS)), st.integers(1, 12)), min_size=1, max_size=3
    ),
    accumulate=st.integers(1, 5),
    interval=st.integers(1, 9),
)
def test_resume_is_exact_for_any_stops(
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    whole: Any,
    stops: list[tuple[str, int]],
    accumulate: int,
    interval: int,
) -> None:
    kind = {"accumulate_grad_batches": accumulate, "val_check_interval": interval}
    state, lines = whole(**kind)
    place = tmp_path_factory.mktemp("stopped") / "run"
    resumed, continued = stop_and_resume(folder, place, stops, missed_is_fine=True, **kind)
    assert_same(state, resumed)
    assert_same(lines, continued)
