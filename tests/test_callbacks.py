"""The callbacks: the clock and its record, the growing batch, the weight decay."""

import itertools
import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import fit, make, read_record
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from hlbgpt.callbacks import (
    HLB010BatchSize,
    LastCheckpoint,
    LossScaledWeightDecay,
    TimeToTarget,
)
from hlbgpt.callbacks.step_shape import EstimatedBatchSize
from hlbgpt.data import TrainLoader
from hlbgpt.runs import load_checkpoint
from hlbgpt.utils.clock import Stopwatch, begin_run, run_seconds
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.git import git_revision

# --- TimeToTarget -----------------------------------------------------------------------------


def test_stops_at_the_validation_that_meets_the_target(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, module = fit(folder, tmp_path, TimeToTarget(target=5.45))
    record = read_record(tmp_path)
    assert record["reached"] is True
    assert record["monitor"] == "val_loss"
    assert record["value"] <= record["target"] == 5.45
    assert run.global_step == record["step"] == record["value_step"] < 8
    assert record["step"] % 2 == 0
    assert record["tokens"] == module.tokens_seen == record["step"] * 4 * 32
    assert record["parameters"] == sum(p.numel() for p in module.net.parameters())
    assert record["torch"] == torch.__version__
    assert record["lightning"] == L.__version__
    assert "cpu" in record["device"]
    assert record["peak_memory_bytes"] > 1e6
    assert 0 < record["train_seconds"] < record["wall_seconds"]
    out = capsys.readouterr().out
    assert out.count("target met: val_loss") == 1
    assert "NOT met" not in out


def test_says_honestly_that_the_target_was_not_met(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(folder, tmp_path, TimeToTarget(target=0.1), max_steps=7)
    record = read_record(tmp_path)
    assert record["reached"] is False
    assert record["step"] == record["value_step"] == 7  # of the final weights
    out = capsys.readouterr().out
    assert out.count("target NOT met: val_loss") == 1
    steps = [line.split()[1] for line in out.splitlines() if line.startswith("step ")]
    assert steps == ["2", "4", "6", "7"]


def test_a_target_to_rise_to(folder: Path, tmp_path: Path) -> None:
    fit(folder, tmp_path, TimeToTarget("val_accuracy", target=1e-9, mode="max"))
    assert read_record(tmp_path)["step"] == 2


def test_a_metric_that_is_not_logged_is_named_before_training(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"no metric .val_los. is logged, which it monitors; choose one"
    ):
        fit(folder, tmp_path, TimeToTarget("val_los"))
    assert not (tmp_path / "record.json").exists()


class Sleeper(L.Callback):
    """Sleeps in training steps, in validation and while batches are made; keeps its own time."""

    def __init__(self, loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slept = dict.fromkeys(("step", "data", "validation", "start"), 0.0)
        self.seen = dict.fromkeys(("train", "data", "validation"), 0.0)
        self.running, self.since = "", 0.0
        gather = loader._gather

        def slow(feed: Any, offsets: Any) -> torch.Tensor:
            begun = time.perf_counter()
            self.sleep("data", 0.21)
            made = gather(feed, offsets)
            self.seen["data"] += time.perf_counter() - begun
            return made

        monkeypatch.setattr(loader, "_gather", slow)

    def sleep(self, what: str, seconds: float) -> None:
        begun = time.perf_counter()
        time.sleep(seconds)
        self.slept[what] += time.perf_counter() - begun

    def turn_to(self, what: str) -> None:
        """The clock of its own: what runs from now on."""
        now = time.perf_counter()
        if self.running:
            self.seen[self.running] += now - self.since
        self.running, self.since = what, now

    def on_train_start(self, *_: Any) -> None:
        self.turn_to("train")

    def on_validation_start(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.turn_to("validation")

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.turn_to("train")

    def on_train_end(self, *_: Any) -> None:
        self.turn_to("")

    def on_fit_start(self, *_: Any) -> None:
        self.sleep("start", 0.3)

    def on_train_batch_start(self, *_: Any) -> None:
        self.sleep("step", 0.37)

    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        self.sleep("start" if trainer.sanity_checking else "validation", 0.6)


def test_each_second_lands_in_its_own_clock(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is slept is in its clock, and each agrees with an independent one to 2%.

    The independent clock sees what other processes take from this one too, so load does no harm.
    """
    sleeper = Sleeper(TrainLoader, monkeypatch)
    _, module = fit(folder, tmp_path, sleeper, TimeToTarget(target=0.1), max_steps=4)
    record, slept = read_record(tmp_path), sleeper.slept
    assert slept["step"] > 4 * 0.37
    assert slept["validation"] >= 2 * math.ceil((5000 - 1) / 32 / 64) * 0.6
    assert record["train_seconds"] >= slept["step"] + slept["data"]
    assert record["data_seconds"] >= slept["data"]
    assert record["validation_seconds"] >= slept["validation"]
    for name, seconds in sleeper.seen.items():
        assert record[f"{name}_seconds"] == pytest.approx(seconds, rel=0.02), name
    # The sanity check and the set-up are in none but the last.
    others = record["train_seconds"] + record["validation_seconds"]
    assert record["wall_seconds"] >= others + slept["start"]
    assert record["compile_seconds"] == module.compile_seconds == 0


def test_clocks_never_go_back(folder: Path, tmp_path: Path) -> None:
    clock, readings = TimeToTarget(target=0.1), []

    class Read(L.Callback):
        def __getattribute__(self, name: str) -> Any:
            if name.startswith("on_") and clock.clocks()["train_seconds"]:
                readings.append(clock.clocks())
            return super().__getattribute__(name)

    fit(folder, tmp_path, clock, Read())
    assert len(readings) > 50
    for before, after in itertools.pairwise(readings):
        assert all(before[name] <= after[name] for name in before)


def test_clocks_go_on_after_a_restart(folder: Path, tmp_path: Path) -> None:
    before = {
        "train_seconds": 1000.0,
        "data_seconds": 100.0,
        "validation_seconds": 200.0,
        "checkpoint_seconds": 20.0,
        "compile_seconds": 30.0,
        "wall_seconds": 5000.0,
    }
    clock = TimeToTarget(target=0.1)
    clock.load_state_dict({**before, "last_measurement": None, "values": []})
    fit(folder, tmp_path, clock, max_steps=2)
    record = read_record(tmp_path)
    for name, seconds in before.items():
        assert seconds <= record[name] < seconds + 500
    assert record["wall_seconds"] > before["wall_seconds"]


def test_tokens_and_clock_come_back_from_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    fit(folder, tmp_path, TimeToTarget(target=0.1), LastCheckpoint(), max_steps=4)
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    # Not the first record: its clock ran on while the checkpoint was written.
    states = load_checkpoint(checkpoint)["callbacks"]
    before = next(state for name, state in states.items() if "TimeToTarget" in name)
    clock = TimeToTarget(target=0.1)
    more = tmp_path / "more"  # the first run keeps its record
    fit(folder, tmp_path, clock, max_steps=6, ckpt_path=checkpoint, default_root_dir=more)
    record = read_record(more)
    assert (record["step"], record["tokens"]) == (6, 6 * 4 * 32)
    assert record["train_seconds"] > before["train_seconds"] > 0


def test_a_checkpoint_every_few_minutes_off_the_clock(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved after the first step that ends so long after the last one; the record says its cost."""
    saved: list[int] = []
    save = L.Trainer.save_checkpoint

    def slow(trainer: L.Trainer, *arguments: Any, **options: Any) -> None:
        saved.append(trainer.global_step)
        time.sleep(0.3)
        save(trainer, *arguments, **options)

    class Step(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            time.sleep(0.25)

    monkeypatch.setattr(L.Trainer, "save_checkpoint", slow)
    callbacks = [Step(), TimeToTarget(target=0.1), LastCheckpoint(every_minutes=0.6 / 60)]
    fit(folder, tmp_path, *callbacks, max_steps=7, val_check_interval=50)
    # Steps of 0.25 s: the third ends 0.75 s after the last checkpoint.
    assert saved == [3, 6, 7]
    record = read_record(tmp_path)
    assert record["checkpoint_seconds"] >= 3 * 0.3
    assert 7 * 0.25 <= record["train_seconds"] < record["wall_seconds"] - 3 * 0.3
    assert load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 7


def test_checkpoints_after_a_validation_are_off_the_clock(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own too, which Lightning saves after all other callbacks."""
    save = L.Trainer.save_checkpoint

    def slow(trainer: L.Trainer, *arguments: Any, **options: Any) -> None:
        time.sleep(0.5)
        save(trainer, *arguments, **options)

    monkeypatch.setattr(L.Trainer, "save_checkpoint", slow)
    callbacks = [TimeToTarget(target=0.1), ModelCheckpoint(tmp_path, save_top_k=-1)]
    fit(folder, tmp_path, *callbacks, max_steps=4)
    record = read_record(tmp_path)
    assert record["train_seconds"] < record["wall_seconds"] - 2 * 0.5
    assert record["train_seconds"] < 0.5


def test_minutes_between_checkpoints_are_above_0() -> None:
    with pytest.raises(InputError, match=r"checkpoint.every_minutes: 0 is not above 0; set it"):
        LastCheckpoint(every_minutes=0)


def test_resumed_training_equals_uninterrupted_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # which draws the sizes of steps
    weights = []
    for name, steps in {"whole": [6], "parts": [4, 6]}.items():
        place = tmp_path / name
        path: Path | None = None
        for end in steps:
            callbacks = [LastCheckpoint(), HLB010BatchSize(rate=4.0)]
            _, module = fit(
                folder,
                tmp_path,
                *callbacks,
                max_steps=end,
                default_root_dir=place,
                ckpt_path=path,
            )
            path = place / "checkpoints" / "last.ckpt"
        weights.append((module.tokens_seen, torch.cat([p.flatten() for p in module.parameters()])))
    assert weights[0][0] == weights[1][0] > 6 * 4 * 32
    assert torch.equal(weights[0][1], weights[1][1])


def test_revision_of_this_checkout() -> None:
    revision = git_revision()
    assert revision is None or len(revision.removesuffix("-dirty")) == 40


def test_stopwatch_adds_laps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watch = Stopwatch(offset=5.0)
    now = 107.0
    assert watch.seconds == 5.0
    assert not watch.running
    watch.start()
    now = 110.0
    watch.start()  # running already: no second start
    assert watch.seconds == 8.0
    now = 111.0
    watch.stop()
    watch.stop()
    now = 200.0
    assert watch.seconds == 9.0


def test_a_run_begins_with_its_process_or_when_it_is_told() -> None:
    before = run_seconds()
    time.sleep(0.05)
    after = run_seconds()
    assert 0.05 <= after - before < 30
    assert before > time.process_time() / (torch.get_num_threads() + 8)
    begin_run()
    assert run_seconds() < before


# --- HLB010BatchSize ------------------------------------------------------------------------------


@given(norms=st.lists(st.floats(0.01, 10), min_size=1, max_size=60))
def test_the_batch_of_0_1_0_follows_its_formula(norms: list[float]) -> None:
    growth = HLB010BatchSize()
    average, n = 1.2, 1.0
    for step, g in enumerate(norms):
        k = growth.micro_batches
        growth.update(g)
        growth.draw(step)
        average = 0.95 * average + 0.05 * g
        n = max(1.0, n + k * 5e-2 * (3e-2 - (average - g)))
        assert growth.estimate == pytest.approx(n)
        assert growth.micro_batches in (math.floor(n), math.ceil(n))


def test_an_estimate_is_the_mean_of_what_is_drawn() -> None:
    batch = EstimatedBatchSize(estimate=2.25)
    drawn = []
    for step in range(2000):
        batch.draw(step)
        drawn.append(batch.micro_batches)
    assert set(drawn) == {2, 3}
    assert sum(drawn) / len(drawn) == pytest.approx(2.25, abs=0.05)


@pytest.mark.parametrize("unit", [1, 3])
def test_the_batch_of_0_1_0_sets_the_micro_batches_of_the_next_step(
    folder: Path, tmp_path: Path, unit: int
) -> None:
    growth, sizes = HLB010BatchSize(rate=0.2, initial_norm=0.0), []

    class Sizes(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            sizes.append(pl_module.tokens_seen // (4 * 32))

    fit(folder, tmp_path, growth, Sizes(), lr=0.1, max_steps=12, micro_batches=unit)
    steps = [after - before for before, after in zip([0, *sizes], sizes, strict=False)]
    assert len(steps) == 12
    assert steps[0] == unit
    assert max(steps) > unit
    assert all(step % unit == 0 for step in steps)


# --- LossScaledWeightDecay --------------------------------------------------------------------


def test_weight_decay_of_block_matrices_only(folder: Path, tmp_path: Path) -> None:
    """With no gradient step, weights shrink by 1 - lr * strength / loss² and nothing else does."""

    class NoGradient(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.loss = pl_module.step_loss.item()
            for parameter in pl_module.parameters():
                parameter.grad.zero_()

    still = NoGradient()
    before = dict(make(folder, tmp_path)[0].net.named_parameters())
    _, module = fit(
        folder, tmp_path, still, LossScaledWeightDecay(strength=20.0), lr=0.5, max_steps=1
    )
    keep = 1 - 0.5 * 20.0 / still.loss**2
    assert 0 < keep < 0.9
    for name, parameter in module.net.named_parameters():
        matrix = name.startswith("blocks.") and parameter.ndim == 2
        torch.testing.assert_close(parameter, before[name] * (keep if matrix else 1.0))
