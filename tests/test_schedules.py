"""Schedules as pure functions, and the callbacks that follow them."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_module import make, trainer
from torch import nn

from hlbgpt.callbacks import SequenceGrowth, TokenSchedule
from hlbgpt.models import GPT
from hlbgpt.optim import MuonAdamW
from hlbgpt.optim.schedules import PowerLaw, Row, plan_steps, shapes, steered_batch
from hlbgpt.training.memory import fitting_tokens, windows_that_fit
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.errors import InputError


@st.composite
def tables(draw: st.DrawFn) -> list[Row]:
    """Tables of two to five rows that name some of the columns."""
    gaps = draw(st.lists(st.integers(1, 3000), min_size=1, max_size=4))
    length, size = st.integers(1, 64), st.integers(1, 900)
    factor = st.none() | st.floats(0, 2)
    rows = [Row(0, draw(length), draw(size), draw(factor), draw(factor), draw(st.integers(0, 500)))]
    for number in range(len(gaps)):
        row = (
            st.none() | length,
            st.none() | size,
            factor,
            factor,
            st.none() | st.integers(0, 500),
        )
        rows.append(Row(sum(gaps[: number + 1]), *(draw(column) for column in row)))
    return rows


@given(table=tables(), micro_batch_tokens=st.integers(1, 2000), world_size=st.integers(1, 3))
def test_steps_follow_the_table(table: list[Row], micro_batch_tokens: int, world_size: int) -> None:
    steps = plan_steps(table, micro_batch_tokens=micro_batch_tokens, world_size=world_size)
    seen = 0
    for step in steps:
        assert step.first_token == seen < table[-1].tokens
        rows = [row for row in table if row.tokens <= seen]
        length = [row.sequence_length for row in rows if row.sequence_length is not None][-1]
        size = [row.step_tokens for row in rows if row.step_tokens is not None][-1]
        assert step.sequence_length == length
        windows = step.batch_size * step.micro_batches * world_size
        assert abs(windows * length - size) <= length * world_size
        assert step.batch_size == 1 or step.batch_size * length <= micro_batch_tokens
        seen += step.tokens(world_size)
    assert seen >= table[-1].tokens  # the budget, exceeded by less than a step
    assert steps[-1].validate
    assert set(shapes(steps)) == {(step.batch_size, step.sequence_length) for step in steps}
    # The cut into micro-batches changes nothing else.
    whole = plan_steps(table, micro_batch_tokens=10**9, world_size=world_size)
    same = [s._replace(batch_size=s.batch_size * s.micro_batches, micro_batches=1) for s in steps]
    assert same == whole


def test_rates_run_in_straight_lines_and_validations_fall_where_planned() -> None:
    table = [
        Row(0, sequence_length=10, step_tokens=100, lr=0.5, momentum=0.8, validate_every=500),
        Row(1000, lr=1.0, validate_every=0),
        Row(2000, momentum=0.9, validate_every=250),
        Row(3000, lr=0.0),
    ]
    steps = plan_steps(table, micro_batch_tokens=1000)
    assert len(steps) == 30
    assert [step.lr for step in steps[:3]] == pytest.approx([0.525, 0.575, 0.625])
    assert steps[10].lr == pytest.approx(0.975)
    assert steps[29].lr == pytest.approx(0.025)
    assert steps[10].momentum == pytest.approx(0.8525)
    assert steps[25].momentum == pytest.approx(0.9)  # the last that is named
    # After 500 and 1000 tokens, not in the second part, then each 250 from 2000 on.
    ends = [step.first_token + step.tokens() for step in steps if step.validate]
    assert ends == [500, 1000, 2300, 2500, 2800, 3000]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Row(0, 8, 64)], "1 rows; give at least"),
        ([Row(5, 8, 64), Row(9)], "first row begins at 5"),
        ([Row(0, 8), Row(9)], "lacks sequence_length or step_tokens"),
        ([Row(0, 8, 64), Row(9), Row(9)], "a row at 9 tokens follows one at 9"),
        ([Row(0, 8, 64), Row(5, step_tokens=0), Row(9)], "step_tokens 0 at 5"),
        ([Row(0, 8, 64), Row(5, lr=-1.0), Row(9)], "lr -1.0 at 5 tokens is negative"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(rows: list[Row], message: str) -> None:
    with pytest.raises(InputError, match=f"schedule.table: .*{message}"):
        TokenSchedule(rows)


def test_power_law_is_that_of_0_4_1() -> None:
    net = nn.Module()
    net.weight = nn.Parameter(torch.zeros(2, 2))
    groups = [
        {"params": [nn.Parameter(torch.zeros(2, 2))], "name": name, "lr": lr}
        for name, lr in (("block_matrices", 3.0), ("head", 5.0), ("slopes", 7.0), ("vectors", 11.0))
    ]
    optimizer = MuonAdamW(groups)
    schedule = PowerLaw(optimizer)
    for step in range(300):
        main = 0.02 + 0.98 * step / 100 if step < 100 else (step - 99) ** -0.08
        expected = [3 * main, 5 * (step + 1) ** -0.2, 7 * 0.995**step, 11 * main]
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)
        optimizer.step()
        schedule.step()


def test_the_steered_batch_stands_still_on_the_expected_norm() -> None:
    parameters, step = 46_009_736, 200
    power = 0.677 * math.log(parameters) ** -0.2
    expected = (parameters * math.log(parameters) * 200.01) ** -power * math.sqrt(parameters)
    how: dict[str, Any] = {"parameters": parameters, "step": step, "rate": 0.5}
    assert steered_batch(3.0, grad_norm=expected, **how) == pytest.approx(3.0)
    assert steered_batch(3.0, grad_norm=2 * expected, **how) == pytest.approx(4.5)
    assert steered_batch(3.0, grad_norm=0.0, **how) == pytest.approx(1.5)
    assert steered_batch(0.0, grad_norm=9 * expected, **how) == 0.1


# --- in training ----------------------------------------------------------------------------------

TABLE = [
    Row(0, sequence_length=8, step_tokens=128, lr=0.5, momentum=0.8),
    Row(512, sequence_length=32, step_tokens=256, lr=1.0),
    Row(1500, lr=0.1),
]


class Watch(L.Callback):
    """Keeps shape, rates and validation of every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.validated: list[int] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        group = optimizer.param_groups[0]
        self.seen.append((pl_module.steps.sequence_length, group["lr"], group["momentum"]))

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)


def muon(groups: Any) -> MuonAdamW:
    return MuonAdamW(groups, {"block_matrices": {"method": "muon", "lr": 0.02}})


def fit(
    folder: Path, tmp_path: Path, *callbacks: L.Callback, optimizer: Any = muon, **data: Any
) -> LanguageModule:
    _, datamodule = make(folder, tmp_path, **data)
    torch.manual_seed(0)
    net = GPT(vocab_size=256, max_sequence_length=32, width=16, num_heads=2, num_blocks=2)
    module = LanguageModule(net, optimizer, compile=False)
    arguments = {"check_val_every_n_epoch": None, "limit_val_batches": 1.0}
    run = trainer(tmp_path, callbacks=list(callbacks), **({"max_steps": -1} | arguments))
    run.fit(module, datamodule)
    return module


def test_training_follows_the_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = Watch()
    table = [TABLE[0], Row(256, validate_every=300), *TABLE[1:]]
    module = fit(folder, tmp_path, TokenSchedule(table, micro_batch_tokens=64), watch)
    assert "minutes of training for 0.00M tokens" in capsys.readouterr().out
    steps = plan_steps(table, micro_batch_tokens=64)
    expected = [(s.sequence_length, 0.02 * s.lr, s.momentum) for s in steps]
    assert [tuple(values) for values in watch.seen] == expected
    assert module.tokens_seen == sum(step.tokens() for step in steps) >= 1500
    assert watch.validated == [number + 1 for number, s in enumerate(steps) if s.validate]


@pytest.mark.parametrize("micro_batch_tokens", [32, 64, "auto"])
def test_the_cut_into_micro_batches_changes_nothing(
    folder: Path, tmp_path: Path, micro_batch_tokens: Any
) -> None:
    def sgd(groups: Any) -> torch.optim.Optimizer:  # nothing that makes much of rounding
        return torch.optim.SGD(groups, lr=0.5)

    whole = fit(folder, tmp_path, TokenSchedule(TABLE, micro_batch_tokens=10**6), optimizer=sgd)
    cut = fit(
        folder, tmp_path, TokenSchedule(TABLE, micro_batch_tokens=micro_batch_tokens), optimizer=sgd
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
    grow = SequenceGrowth(initial=8, every_n_steps=3)
    module, data = make(folder, tmp_path)
    module.optimizer = lambda groups: MuonAdamW(groups)
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
