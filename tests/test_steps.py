"""Steps and validations, held against what they are defined to be."""

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hlbgpt.training.steps import StepPlan


def trainer_like(batches: int, interval: int, max_steps: int, every_pass: bool) -> Any:
    """What StepPlan asks of a trainer."""
    loop = SimpleNamespace(_should_check_val_epoch=lambda: True)
    return SimpleNamespace(
        num_training_batches=batches,
        val_check_batch=interval,
        check_val_every_n_epoch=1 if every_pass else None,
        max_steps=max_steps,
        global_step=0,
        accumulate_grad_batches=1,
        fit_loop=SimpleNamespace(epoch_loop=loop, total_batch_idx=0),
    )


@given(
    batches=st.integers(1, 12),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    interval=st.integers(1, 10),
    every_pass=st.booleans(),
    max_steps=st.integers(1, 30),
    stop_at=st.integers(0, 60),
)
def test_steps_and_validations(
    batches: int,
    sizes: list[int],
    interval: int,
    every_pass: bool,
    max_steps: int,
    stop_at: int,
) -> None:
    """Over passes of `batches` batches, with a plan taken up again from its state in between."""
    trainer = trainer_like(batches, interval, max_steps, every_pass)
    plan = StepPlan()
    plan.micro_batches = sizes[0]
    plan.begin_run(trainer)
    made: list[int] = []  # micro-batches of each step
    validated: list[tuple[int, int]] = []  # after how many batches of the pass, and in all
    in_step = total = 0
    while len(made) < max_steps:
        for batch_idx in range(batches):
            if total == stop_at:
                state, plan = plan.state_dict(), StepPlan()
                plan._interval = interval
                plan.micro_batches = state["micro_batches"]
                plan.load_state_dict(state, None)  # type: ignore[arg-type]
            trainer.fit_loop.total_batch_idx = total
            trainer.global_step = len(made)
            assert plan.begins_step(batch_idx) == (in_step == 0)
            plan.begin_batch(trainer, batch_idx)
            in_step, total = in_step + 1, total + 1
            ends = batch_idx + 1 == plan.end
            assert trainer.accumulate_grad_batches == plan.end
            # Lightning validates where the number of batches is a multiple of this.
            done = batch_idx + 1 if every_pass else total
            if done % trainer.val_check_batch == 0:
                assert ends
                validated.append((batch_idx + 1, total))
            if ends:
                planned = sizes[min(len(made), len(sizes) - 1)]
                first = batch_idx + 1 - in_step
                assert in_step == min(planned, batches - first)
                made.append(in_step)
                in_step = 0
                plan.micro_batches = sizes[min(len(made), len(sizes) - 1)]
            if len(made) == max_steps:
                break
    # One validation for each step that contains a multiple of the interval, and for the last.
    expected, pass_done, all_done = [], 0, 0
    for number, size in enumerate(made, 1):
        before = pass_done if every_pass else all_done
        due = any((before + i) % interval == 0 for i in range(1, size + 1))
        pass_done, all_done = pass_done + size, all_done + size
        if due or number == max_steps:
            expected.append((pass_done, all_done))
        pass_done %= batches
    assert validated == expected
