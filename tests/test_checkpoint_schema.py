"""Checkpoints with entries missing or wrong: one line each, in whatever is done with them."""

import contextlib
import math
import random
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bad_input import error_of

from hlbgpt import PretrainedModel
from hlbgpt.runs.checkpoint_io import load_checkpoint
from hlbgpt.runs.checkpoint_schema import RESTORED, TRAINING, check_checkpoint, require_entries
from hlbgpt.utils.errors import InputError

Place = tuple[Any, ...]


def places(value: Any, path: Place = ()) -> Iterator[Place]:
    """The paths of all entries of a checkpoint, of long lists those of the first three."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value[:3]):
            yield from places(item, (*path, number))


def parts(place: str) -> Place:
    """The keys and numbers of a place as in `a.0.b`; names of loops have dots."""
    found = place.replace("epoch_loop.", "epoch_loop:").split(".")
    return tuple(int(part) if part.isdigit() else part.replace(":", ".") for part in found)


DELETED = object()


def changed(value: Any, path: Place, new: Any) -> Any:
    """A copy of nested entries with `new` at `path`, or with what `new` makes of the old entry."""
    key, *rest = path
    entries = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        entries[key] = changed(entries[key], tuple(rest), new)
    elif new is DELETED:
        del entries[key]
    else:
        entries[key] = new(entries[key]) if callable(new) else new
    return tuple(entries) if isinstance(value, tuple) else entries


CHANGES: dict[str, Any] = {
    "delete": DELETED,
    "twice": lambda old: [old, old],
    "None": None,
    "text": "x",
    "list": [1, "a"],
    "dict": {"a": 1},
    "true": True,
    "zero": 0,
    "minus one": -1,
    "large": 10**12,
    "huge": 10**18,
    "beyond": 10**400,
    "half": 0.5,
    "NaN": math.nan,
    "infinity": math.inf,
    "tensor": torch.zeros(3, 5),
    "integers": torch.ones(2, dtype=torch.int8),
    "empty": torch.zeros(0),
}


def mutation(checkpoint: dict[str, Any], seed: int) -> tuple[str, dict[str, Any]]:
    """A checkpoint with one to three entries changed at random, and what was done."""
    draw, done = random.Random(seed), []
    all_places = list(places(checkpoint))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        depth = draw.randint(1, 8)
        path = draw.choice([path for path in all_places if len(path) <= depth])
        name = draw.choice(list(CHANGES))
        with contextlib.suppress(LookupError, TypeError):  # what an earlier change took away
            checkpoint = changed(checkpoint, path, CHANGES[name])
            done.append(f"{'.'.join(map(str, path))} {name}")
    return "; ".join(done), checkpoint


COMMANDS = ("fit", "fit", "fit", "validate", "test", "predict", "from_checkpoint")


def use(run: Callable[..., str], command: str, path: Path) -> None:
    if command == "from_checkpoint":
        PretrainedModel.from_checkpoint(path).generate("a", max_new_tokens=1)
    elif command == "predict":
        run(command, "--ckpt_path", path, "--data.prompts=a", "--model.sampling.max_new_tokens=1")
    elif command == "fit":
        run(command, "--ckpt_path", path, "--trainer.max_steps=6", "--run_name=fuzz")
    else:
        run(command, "--ckpt_path", path, "--trainer.limit_test_batches=1")


COUNTS = {"zero", "large"}
AMOUNTS = {*COUNTS, "half", "huge"}
NUMBERS = {*AMOUNTS, "minus one", "NaN", "infinity"}
# Entries that are checked, and the changes of them that leave a checkpoint as it may be.
TABLE: dict[str, set[str]] = {
    "state_dict": set(),
    "pytorch-lightning_version": set(),
    "epoch": COUNTS,
    "global_step": COUNTS,
    "loops": set(),
    "loops.fit_loop": set(),
    "loops.fit_loop.epoch_loop.batch_progress": {"dict"},
    "loops.fit_loop.epoch_progress.total.ready": {*COUNTS, "true", "delete", "dict"},
    "callbacks": set(),
    "callbacks.TimeToTarget": {"delete"},
    "callbacks.TimeToTarget.train_seconds": AMOUNTS,
    "callbacks.TimeToTarget.wall_seconds": AMOUNTS,
    "callbacks.TimeToTarget.last_measurement": {"None"},
    "callbacks.TimeToTarget.last_measurement.value": NUMBERS,
    "callbacks.TimeToTarget.last_measurement.step": COUNTS,
    "callbacks.TimeToTarget.last_measurement.validation.fingerprint": {"text"},
    "callbacks.TimeToTarget.last_measurement.validation.complete": {"true"},
    "callbacks.TimeToTarget.values": set(),
    "callbacks.TimeToTarget.values.0": {"delete"},
    "optimizer_states": set(),
    "optimizer_states.0.state": {"dict"},
    "optimizer_states.0.param_groups": set(),
    "optimizer_states.0.param_groups.0.params": set(),
    "lr_schedulers": set(),
    "lr_schedulers.0": {"dict", "delete"},
    "hlbgpt_config": {"text", "delete"},
    "hlbgpt": set(),
    "hlbgpt.tokens_seen": COUNTS,
    "hlbgpt.batch_tokens": COUNTS,
    "hlbgpt.flops": AMOUNTS,
    "hlbgpt.validated": {"true"},
    "hlbgpt.tokenizer": {"text"},
    "hlbgpt.vocab_size": COUNTS,
    "hlbgpt.texts.train": set(),
    "hlbgpt.random": set(),
    "hlbgpt.random.0.torch": set(),
    "hlbgpt.random.0.python": set(),
    "hlbgpt.random.0.numpy": set(),
    "hlbgpt.random.0.device": {"None", "tensor", "integers", "empty"},
}


@pytest.fixture(scope="module")
def whole(trained: Path) -> dict[str, Any]:
    return load_checkpoint(trained)


def check_to_train_on(checkpoint: Any) -> None:
    check_checkpoint(checkpoint, "a.ckpt")
    require_entries(checkpoint, TRAINING, "a.ckpt")


@pytest.mark.parametrize("place", TABLE)
def test_each_entry_missing_or_wrong_is_named(whole: dict[str, Any], place: str) -> None:
    path = parts(place)
    for name, change in CHANGES.items():
        broken = changed(whole, path, change)
        if name in TABLE[place]:
            check_checkpoint(broken, "a.ckpt")
            continue
        with pytest.raises(InputError) as error:
            check_to_train_on(broken)
        assert str(error.value).startswith("a.ckpt is "), name
        assert place.split(".")[0] in str(error.value), name
        assert len(str(error.value)) < 300, name


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("validate", ["pytorch-lightning_version", "state_dict"]),
        ("test", ["global_step"]),
        ("predict", ["epoch"]),
        ("fit", ["loops", "callbacks", "hlbgpt", "optimizer_states"]),
    ],
)
def test_what_lightning_needs_is_asked_for_in_each_command(
    hlbgpt: Callable[..., str], trained: Path, capfd: Any, command: str, keys: list[str]
) -> None:
    assert set(keys) <= {*RESTORED, *TRAINING}
    checkpoint = torch.load(trained, weights_only=True)
    for key in keys:
        torch.save(changed(checkpoint, (key,), DELETED), "a.ckpt")
        message = error_of(hlbgpt, capfd, command, "--ckpt_path=a.ckpt")
        assert key in message or "holds weights only" in message
    assert not Path("runs").exists()


def entry_in_itself() -> Any:
    entry: dict[str, Any] = {}
    entry["a"] = [entry]
    return entry


def shared(times: int) -> Any:
    entry: Any = 0
    for _ in range(times):
        entry = [entry] * 10
    return entry


def deep(times: int) -> Any:
    entry: Any = 0
    for _ in range(times):
        entry = {"a": entry}
    return entry


@pytest.mark.parametrize("entry", [entry_in_itself(), shared(9), deep(60)])
def test_entries_that_are_huge_or_deep_are_refused_at_once(tmp_path: Path, entry: Any) -> None:
    torch.save({"state_dict": {}, "callbacks": {"x": {"y": entry}}}, path := tmp_path / "a.ckpt")
    start = time.monotonic()
    with pytest.raises(InputError, match="its entries hold more than 10000000 values or are nest"):
        load_checkpoint(path)
    assert time.monotonic() - start < 1


def test_a_compressed_file_is_no_checkpoint(trained: Path, tmp_path: Path) -> None:
    """A few kilobytes could hold gigabytes."""
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(trained) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(InputError, match="is incomplete, is no checkpoint, or contains code"):
        load_checkpoint(path)


STATES = {
    "optimizer, a state": ("optimizer_states.0.state.7.exp_avg", "x"),
    "optimizer, a shape": ("optimizer_states.0.state.7.exp_avg", torch.zeros(3, 5)),
    "optimizer, a setting": ("optimizer_states.0.param_groups.1.betas", 7),
    "schedule": ("lr_schedulers.0._schedule_phases", None),
    "loop": ("loops.fit_loop.epoch_progress", {"a": 1}),
    "loader, a place": ("loops.fit_loop.state_dict.combined_loader.0.next_window", 10**12),
    "callback": ("callbacks.EarlyStopping{'monitor': 'val_loss', 'mode': 'min'}", {"a": 1}),
}


@pytest.mark.parametrize("case", STATES)
def test_what_the_schema_cannot_know_is_one_line(
    hlbgpt: Callable[..., str], trained: Path, capfd: Any, case: str
) -> None:
    place, change = STATES[case]
    head, _, last = place.partition(".EarlyStopping")
    path = parts(head)
    path = (*path, f"EarlyStopping{last}") if last else path
    torch.save(changed(torch.load(trained, weights_only=True), path, change), "a.ckpt")
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"]
    words = ["--ckpt_path=a.ckpt", "--trainer.max_steps=6", *stop]
    with pytest.raises(SystemExit):
        hlbgpt("fit", *words)
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    line = captured.err.splitlines()[-1]
    assert line.startswith("hlbgpt: error: ")
    assert "checkpoint" in line


@pytest.mark.parametrize(
    "seeds",
    [
        range(20),
        *(pytest.param(range(n, n + 20), marks=pytest.mark.slow) for n in range(20, 200, 20)),
    ],
    ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}",
)
def test_changed_checkpoints_end_in_one_line_or_work(
    hlbgpt: Callable[..., str], trained: Path, tmp_path: Path, capfd: Any, seeds: range
) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    for seed in seeds:
        what, mutated = mutation(checkpoint, seed)
        torch.save(mutated, path := tmp_path / "a.ckpt")
        command, start = COMMANDS[seed % len(COMMANDS)], time.monotonic()
        try:
            use(hlbgpt, command, path)
        except (SystemExit, InputError) as stop:
            code = getattr(stop, "code", 2)
            assert code in (1, 2), f"{seed}: {what}"
        except Exception as error:
            pytest.fail(f"seed {seed}, {command}: {what}: {type(error).__name__}: {error}")
        assert time.monotonic() - start < 10, f"{seed}: {what}"
        assert "Traceback" not in capfd.readouterr().err
        shutil.rmtree("runs", ignore_errors=True)
