"""The callbacks that follow a schedule while a network trains."""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import numpy as np
import pytest
import torch
from helpers import At, SaveAfter, make, sgd, trainer
from hypothesis import given, settings
from hypothesis import strategies as st

from hlbgpt.callbacks import LastCheckpoint, SequenceLengthDoubling, TokenSchedule
from hlbgpt.data import TrainLoader
from hlbgpt.models import GPT, FastGPT
from hlbgpt.optim import MuonAdamW
from hlbgpt.optim.schedules import ScheduleRow, plan_steps
from hlbgpt.runs.folder import last_checkpoint
from hlbgpt.training.memory import fitting_tokens, windows_that_fit
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.errors import InputError

TABLE = [
    ScheduleRow(0, sequence_length=8, step_tokens=128, lr=0.5, momentum=0.8),
    ScheduleRow(512, sequence_length=32, step_tokens=256, lr=1.0),
    ScheduleRow(1500, lr=0.1),
]


class Watch(L.Callback):
    """Keeps shape, rates and validation of every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.validated: list[int] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        group = optimizer.param_groups[0]
        self.seen.append((pl_module.step_shape[2], group["lr"], group["momentum"]))

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)


def muon(groups: Any) -> MuonAdamW:
    return MuonAdamW(groups, {"block_matrices": {"lr": 0.02}}, lr=0.001)


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10**9)


def fit(
    folder: Path, tmp_path: Path, *callbacks: L.Callback, optimizer: Any = muon, **data: Any
) -> LanguageModule:
    module, datamodule = make(folder, tmp_path, optimizer=optimizer, **data)
    trainer(tmp_path, callbacks=list(callbacks), limit_val_batches=1.0).fit(module, datamodule)
    return module


def test_training_follows_the_table(folder: Path, tmp_path: Path) -> None:
    watch = Watch()
    table = [TABLE[0], ScheduleRow(256, validate_every=300), *TABLE[1:]]
    module = fit(folder, tmp_path, TokenSchedule(table, micro_batch_tokens=64), watch)
    steps = plan_steps(table, micro_batch_tokens=64)
    expected = [(s.sequence_length, 0.02 * s.lr, s.momentum) for s in steps]
    assert [tuple(values) for values in watch.seen] == expected
    assert module.tokens_seen == sum(step.tokens() for step in steps) >= 1500
    assert watch.validated == [number + 1 for number, s in enumerate(steps) if s.validate]


def test_the_weight_of_the_second_loss_follows_the_table(folder: Path, tmp_path: Path) -> None:
    weights: list[float] = []

    class Weights(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            weights.append(pl_module.net.vocab_loss_weight.item())

    table = [replace(TABLE[0], vocab_loss=0.5), TABLE[1], replace(TABLE[2], vocab_loss=0.0)]
    net = FastGPT(256, 32, width=16, num_heads=2, num_blocks=1, pointer_dim=8)
    fit(folder, tmp_path, TokenSchedule(table, micro_batch_tokens=64), Weights(), net=net)
    expected = [step.vocab_loss for step in plan_steps(table, micro_batch_tokens=64)]
    assert weights == pytest.approx(expected)
    assert weights[0] > weights[-1] > 0


def test_a_second_loss_needs_a_pointer(folder: Path, tmp_path: Path) -> None:
    table = [replace(TABLE[0], vocab_loss=0.5), *TABLE[1:]]
    with pytest.raises(InputError, match=r"schedule\.table: vocab_loss is set, but GPT has no"):
        fit(folder, tmp_path, TokenSchedule(table, micro_batch_tokens=64))


@pytest.mark.parametrize("micro_batch_tokens", [32, 64, "auto"])
def test_the_cut_into_micro_batches_changes_nothing(
    folder: Path, tmp_path: Path, micro_batch_tokens: Any
) -> None:
    whole = fit(
        folder, tmp_path, TokenSchedule(TABLE, micro_batch_tokens=10**6), optimizer=sgd(0.5)
    )
    cut = fit(
        folder,
        tmp_path,
        TokenSchedule(TABLE, micro_batch_tokens=micro_batch_tokens),
        optimizer=sgd(0.5),
    )
    assert whole.tokens_seen == cut.tokens_seen
    for ours, theirs in zip(cut.net.parameters(), whole.net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_tokens_on_the_device_are_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    runs = [
        fit(folder, tmp_path, TokenSchedule(TABLE, micro_batch_tokens=64), tokens_on_device=there)
        for there in (False, True)
    ]
    for ours, theirs in zip(*(run.net.parameters() for run in runs), strict=True):
        assert torch.equal(ours, theirs)


def test_sequence_length_doubles_after_each_interval(folder: Path, tmp_path: Path) -> None:
    watch = Watch()
    grow = SequenceLengthDoubling(initial=8, every_n_steps=3)
    module, data = make(folder, tmp_path, optimizer=MuonAdamW)
    trainer(tmp_path, max_steps=12, callbacks=[grow, watch]).fit(module, data)
    # As 0.4.1 does: the step whose number is a multiple is the last of its length.
    assert [length for length, *_ in watch.seen] == [8] * 4 + [16] * 3 + [32] * 5
    assert module.tokens_seen == 12 * 4 * 32


@given(
    one=st.integers(1, 100),
    more=st.integers(1, 100),
    room=st.integers(1, 10**4),
    most=st.integers(1, 50),
)
def test_the_largest_micro_batch_that_fits(one: int, more: int, room: int, most: int) -> None:
    def peak(windows: int) -> int:
        return one + (windows - 1) * more

    if one > room:
        with pytest.raises(InputError, match="micro_batch_tokens: one window takes"):
            windows_that_fit(peak, room, most)
        return
    windows = windows_that_fit(peak, room, most)
    assert 1 <= windows <= most
    assert peak(windows) <= room
    assert windows == most or peak(windows + 1) > room


def test_on_a_cpu_a_micro_batch_is_never_larger_than_a_step() -> None:
    net = GPT(vocab_size=64, max_sequence_length=16, width=16, num_heads=2, num_blocks=1)
    cpu = torch.device("cpu")
    assert fitting_tokens(net, 16, 160, cpu) == 160
    assert 16 <= fitting_tokens(net, 16, 10**9, cpu) < 10**5


def test_a_run_is_resumed_with_its_own_table(folder: Path, tmp_path: Path) -> None:
    """Another table would put the run at another step; a later end is fine."""
    fit(folder, tmp_path, TokenSchedule(TABLE, micro_batch_tokens=64), LastCheckpoint())
    path = tmp_path / "checkpoints" / "last.ckpt"

    def resume(table: list[ScheduleRow]) -> LanguageModule:
        module, data = make(folder, tmp_path, optimizer=muon)
        schedule = TokenSchedule(table, micro_batch_tokens=128)
        trainer(tmp_path, callbacks=[schedule]).fit(module, data, ckpt_path=path)
        return module

    longer = [*TABLE[:2], ScheduleRow(3000, lr=0.1)]
    assert resume(longer).tokens_seen >= 3000
    other = [ScheduleRow(0, sequence_length=8, step_tokens=512), ScheduleRow(9000, lr=0.1)]
    with pytest.raises(InputError, match=r"schedule.table: it has [\d,]+ tokens before step \d+"):
        resume(other)


# --- the order of the windows -------------------------------------------------------------------


def windows_of_steps(
    table: list[ScheduleRow], segments: list[tuple[int, int, int]]
) -> list[list[tuple[int, ...]]]:
    """The windows of each step, sorted, of a run that is stopped and resumed with another cut.

    Args:
        table: The schedule.
        segments: (steps, micro_batch_tokens, ranks) of each part of the run; the last goes on to
            the end whatever its steps.
    """
    tokens, seen, state = np.arange(2000, dtype="<u2"), [], None
    for number, (steps, micro_batch_tokens, ranks) in enumerate(segments):
        plan = plan_steps(table, micro_batch_tokens=micro_batch_tokens, world_size=ranks)
        last = len(plan) if number == len(segments) - 1 else min(len(plan), len(seen) + steps)
        feeds = [TrainLoader(tokens, 1, rank, ranks) for rank in range(ranks)]
        for feed in feeds:
            feed.set_step(batch_size=plan[0].batch_size, sequence_length=plan[0].sequence_length)
        for feed in feeds if state else []:
            feed.load_state_dict(state)
        for step in range(len(seen), last):
            windows: list[tuple[int, ...]] = []
            for feed in feeds:
                feed.set_step(
                    micro_batches=plan[step].micro_batches,
                    batch_size=plan[step].batch_size,
                    sequence_length=plan[step].sequence_length,
                )
                windows += map(tuple, next(iter(feed)).flatten(0, 1).tolist())
            seen.append(sorted(windows))
        state = feeds[0].state_dict()
    return seen


@st.composite
def whole_tables(draw: st.DrawFn) -> list[ScheduleRow]:
    """Tables whose steps are whole windows on 1, 2 and 3 devices."""
    rows = []
    for start in sorted(draw(st.sets(st.integers(1, 3000), max_size=3)) | {0}):
        length = draw(st.integers(1, 20))
        rows.append(ScheduleRow(start, length, 6 * length * draw(st.integers(1, 3))))
    return [*rows, ScheduleRow(3001 + draw(st.integers(0, 500)))]


parts = st.tuples(st.integers(0, 30), st.integers(1, 400), st.integers(1, 3))


@settings(max_examples=30)
@given(table=whole_tables(), segments=st.lists(parts, min_size=1, max_size=4))
def test_a_step_has_the_same_windows_for_any_cut_any_stop_and_any_number_of_ranks(
    table: list[ScheduleRow], segments: list[tuple[int, int, int]]
) -> None:
    assert windows_of_steps(table, segments) == windows_of_steps(table, [(0, 10**6, 1)])


@pytest.fixture(scope="module")
def whole_run(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[torch.Tensor], dict[int, Path]]:
    """The windows of each step of a run, and checkpoints around its change of shape."""
    run = tmp_path_factory.mktemp("whole")
    look = At("on_train_batch_start", lambda trainer, module, batch, number: batch.flatten(0, 1))
    kept: dict[int, Path] = {}

    def keep(trainer: L.Trainer, *_: Any) -> None:
        if (step := trainer.global_step) in (3, 4, 5):
            kept[step] = shutil.copy(last_checkpoint(run), run / f"{step}.ckpt")

    saves = [SaveAfter(3, 4, 5), At("on_train_batch_start", keep)]
    fit(folder, run, TokenSchedule(TABLE, micro_batch_tokens=64), look, *saves)
    assert [len(windows[0]) - 1 for windows in look.found[:6]] == [8] * 4 + [32] * 2
    return look.found, kept


@pytest.mark.parametrize("micro_batch_tokens", [8, 10**6])
@pytest.mark.parametrize("stop", [3, 4, 5], ids=["before", "at", "after"])
def test_a_run_resumed_around_a_change_of_shape_with_another_cut_sees_the_same_windows(
    folder: Path, tmp_path: Path, whole_run: Any, stop: int, micro_batch_tokens: int
) -> None:
    windows, checkpoints = whole_run
    look = At("on_train_batch_start", lambda trainer, module, batch, number: batch.flatten(0, 1))
    module, data = make(folder, tmp_path, optimizer=muon)
    schedule = TokenSchedule(TABLE, micro_batch_tokens=micro_batch_tokens)
    trainer(tmp_path, callbacks=[schedule, look]).fit(module, data, ckpt_path=checkpoints[stop])
    assert len(look.found) == len(windows) - stop
    for ours, theirs in zip(look.found, windows[stop:], strict=True):
        assert torch.equal(ours, theirs)


# --- large numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_steps", "table", "scheduler"),
    [(10**9, [], None), (10**9, [], one_cycle), (2, [TABLE[0], ScheduleRow(10**15, lr=0.1)], None)],
    ids=["steps", "steps and a learning-rate schedule", "tokens of a table"],
)
def test_nothing_takes_long_because_a_number_is_large(
    folder: Path, tmp_path: Path, max_steps: int, table: list[ScheduleRow], scheduler: Any
) -> None:
    schedule = TokenSchedule(table, micro_batch_tokens=64)
    module, data = make(folder, tmp_path, lr_scheduler=scheduler, max_tokens=256)
    began = time.monotonic()
    trainer(tmp_path, max_steps=max_steps, callbacks=[schedule]).fit(module, data)
    assert time.monotonic() - began < 10
    assert module.tokens_seen == 256


def test_micro_batches_found_on_the_gpu_are_checked_against_the_text(
    folder: Path, tmp_path: Path
) -> None:
    table = [ScheduleRow(0, sequence_length=32, step_tokens=64), ScheduleRow(9**9)]
    table.insert(1, ScheduleRow(100, step_tokens=32 * 6000))
    schedule = TokenSchedule(table)
    with (
        patch("hlbgpt.callbacks.token_schedule.fitting_tokens", return_value=10**9),
        pytest.raises(InputError, match=r"schedule.table: train split too short"),
    ):
        fit(folder, tmp_path, schedule)
