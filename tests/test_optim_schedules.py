"""Schedules as pure functions."""

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hlbgpt.optim import MuonAdamW
from hlbgpt.optim.schedules import (
    PlannedStep,
    PowerLaw,
    ScheduleRow,
    check_table,
    hlb041_micro_batches,
    plan_steps,
    step_shapes,
)


@st.composite
def tables(draw: st.DrawFn) -> list[ScheduleRow]:
    """Tables of two to five rows; each row after the first sets some of the columns."""
    gaps = draw(st.lists(st.integers(1, 3000), min_size=1, max_size=4))
    factor = st.none() | st.floats(0, 2)
    lengths, sizes, marks = st.integers(1, 64), st.integers(1, 900), st.integers(0, 500)
    columns = (lengths, sizes, factor, factor, factor, marks)
    rows = [ScheduleRow(0, *map(draw, columns))]
    for tokens in itertools.accumulate(gaps):
        rows.append(ScheduleRow(tokens, *(draw(st.none() | column) for column in columns)))
    return rows


@given(table=tables(), micro_batch_tokens=st.integers(1, 2000), world_size=st.integers(1, 3))
def test_steps_follow_the_table(
    table: list[ScheduleRow], micro_batch_tokens: int, world_size: int
) -> None:
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
    assert set(step_shapes(steps)) == {(step.batch_size, step.sequence_length) for step in steps}
    # The cut into micro-batches changes nothing else.
    whole = plan_steps(table, micro_batch_tokens=10**9, world_size=world_size)
    same = [s._replace(batch_size=s.batch_size * s.micro_batches, micro_batches=1) for s in steps]
    assert same == list(whole)


def listed_steps(
    table: list[ScheduleRow], micro_batch_tokens: int, world_size: int
) -> list[PlannedStep]:
    """The slow reference: every step in turn, from the rows themselves."""

    def last(column: str, tokens: int) -> tuple[int, Any]:
        rows = [row for row in table if row.tokens <= tokens and getattr(row, column) is not None]
        return (rows[-1].tokens, getattr(rows[-1], column)) if rows else (0, None)

    def interpolated(column: str, tokens: float) -> float | None:
        rows = [row for row in table if getattr(row, column) is not None]
        values = [getattr(row, column) for row in rows]
        return float(np.interp(tokens, [row.tokens for row in rows], values)) if rows else None

    steps, start, end = [], 0, table[-1].tokens
    while start < end:
        length = last("sequence_length", start)[1]
        windows = max(1, round(last("step_tokens", start)[1] / (length * world_size)))
        room = max(1, micro_batch_tokens // length)
        batch_size = max(
            size for size in range(1, windows + 1) if not windows % size if size <= room
        )
        stop = start + windows * length * world_size
        begin, every = last("validate_every", start)
        marks = every and (stop - begin) // every > (start - begin) // every
        lr, momentum, vocab_loss = (
            interpolated(name, (start + stop) / 2) for name in ("lr", "momentum", "vocab_loss")
        )
        shape = length, batch_size, windows // batch_size
        lr = 1.0 if lr is None else lr
        validate = bool(stop >= end or marks)
        steps.append(PlannedStep(start, *shape, lr, momentum, vocab_loss, validate))
        start = stop
    return steps


@given(table=tables(), micro_batch_tokens=st.integers(1, 2000), world_size=st.integers(1, 3))
def test_a_plan_is_the_list_of_its_steps(
    table: list[ScheduleRow], micro_batch_tokens: int, world_size: int
) -> None:
    plan = plan_steps(table, micro_batch_tokens=micro_batch_tokens, world_size=world_size)
    expected = listed_steps(table, micro_batch_tokens, world_size)
    assert len(plan) == len(expected)
    for step, listed in zip(plan, expected, strict=True):
        found, wanted = (
            {name: getattr(each, name) for name in ("lr", "momentum", "vocab_loss")}
            for each in (step, listed)
        )
        assert found == pytest.approx(wanted)  # compilers may round once less
        assert step == listed._replace(**found)
    assert plan[-1] == plan[len(plan) - 1]
    with pytest.raises(IndexError):
        plan[len(plan)]
    shapes = [(step.batch_size, step.sequence_length) for step in expected]
    assert step_shapes(plan) == list(dict.fromkeys(shapes))
    counted = Counter({stage[3:]: 0 for stage in plan.stages})
    for stage in plan.stages:
        counted[stage[3:]] += stage.steps
    assert counted == Counter(step[1:4] for step in expected)


def test_a_plan_of_10_to_the_18_tokens_is_made_at_once() -> None:
    end = 10**18
    table = [ScheduleRow(0, 7, 64, lr=1.0, validate_every=10**6), ScheduleRow(end, lr=0.0)]
    table.insert(1, ScheduleRow(end // 2, sequence_length=2**31, step_tokens=2**31))
    plan = plan_steps(table, micro_batch_tokens=10**18)
    assert len(plan) == sum(stage.steps for stage in plan.stages) > 7 * 10**15
    assert step_shapes(plan) == [(9, 7), (1, 2**31)]
    for number in (0, 10**15, plan.stages[1].first_step, len(plan) - 1):
        step = plan[number]
        assert step.lr == pytest.approx(1 - step.first_token / end, abs=1e-8)
    assert plan[-1].first_token < end <= plan[-1].first_token + plan[-1].tokens()


def test_rates_are_interpolated_and_validations_fall_where_planned() -> None:
    table = [
        ScheduleRow(
            0, sequence_length=10, step_tokens=100, lr=0.5, momentum=0.8, validate_every=500
        ),
        ScheduleRow(1000, lr=1.0, validate_every=0),
        ScheduleRow(2000, momentum=0.9, validate_every=250),
        ScheduleRow(3000, lr=0.0),
    ]
    steps = list(plan_steps(table, micro_batch_tokens=1000))
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
        ([(0, 8, 64)], "1 rows; give at least"),
        ([(5, 8, 64), (9,)], "first row begins at 5"),
        ([(0, 8), (9,)], "lacks sequence_length or step_tokens"),
        ([(0, 8, 64), (9,), (9,)], "a row at 9 tokens follows one at 9"),
        ([(0, 8, 64), (5, None, 0), (9,)], "step_tokens 0 at 5 tokens; use 1 or more"),
        ([(0, 8, 64), (5, None, None, -1.0), (9,)], "lr -1.0 at 5 tokens; use 0 or more"),
        ([(0, 8, 64, float("nan")), (9,)], "lr nan at 0 tokens; use 0 or more"),
        ([(0, 8, 10**15), (9,)], "step_tokens 1000000000000000 at 0 tokens; use 2147483648 or les"),
        ([(0, 10**15, 8), (9,)], "sequence_length 1000000000000000 at 0 tokens; use 21474836"),
        ([(0, 8, 64), (10**30,)], "tokens 10+ at 10+ tokens; use 10+ or less"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(rows: list[tuple[Any, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_table([ScheduleRow(*row) for row in rows])


def test_power_law_is_that_of_hlb_gpt_0_4_1() -> None:
    net = nn.Module()
    net.weight = nn.Parameter(torch.zeros(2, 2))
    groups = [
        {"params": [nn.Parameter(torch.zeros(2, 2))], "name": name, "lr": lr}
        for name, lr in (
            ("block_matrices", 3.0),
            ("lm_head", 5.0),
            ("slopes", 7.0),
            ("vectors", 11.0),
        )
    ]
    optimizer = MuonAdamW(groups)
    schedule = PowerLaw(optimizer)
    for step in range(300):
        main = 0.02 + 0.98 * step / 100 if step < 100 else (step - 99) ** -0.08
        expected = [3 * main, 5 * (step + 1) ** -0.2, 7 * 0.995**step, 11 * main]
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)
        optimizer.step()
        schedule.step()


def test_micro_batches_stay_while_the_norm_is_as_expected() -> None:
    parameters, step = 46_009_736, 200
    power = 0.677 * math.log(parameters) ** -0.2
    expected = (parameters * math.log(parameters) * 200.01) ** -power * math.sqrt(parameters)
    how: dict[str, Any] = {"parameters": parameters, "step": step, "rate": 0.5}
    assert hlb041_micro_batches(3.0, grad_norm=expected, **how) == pytest.approx(3.0)
    assert hlb041_micro_batches(3.0, grad_norm=2 * expected, **how) == pytest.approx(4.5)
    assert hlb041_micro_batches(3.0, grad_norm=1e9, **how) == pytest.approx(12.0)  # not endless
    assert hlb041_micro_batches(3.0, grad_norm=0.0, **how) == pytest.approx(1.5)
    assert hlb041_micro_batches(0.0, grad_norm=9 * expected, **how) == 0.1
