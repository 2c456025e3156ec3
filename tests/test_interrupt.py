"""Signals and second starts: nothing is lost, and the run goes on."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import LAST, QUICKSTART, RUN
from crash_test import curves
from helpers import names, number_events
from test_bad_input import error_of
from test_resume import assert_same

from hlbgpt.runs import load_checkpoint
from hlbgpt.runs.folder import exclusive

# Sends itself a signal, once, in a hook; and keeps its hands off the run else.
SIGNAL = """
import os
import signal
from pathlib import Path

import lightning as L


class Signal(L.Callback):
    '''Sends a signal.

    Args:
        name: Which.
        hook: Where.
        count: At the how-manieth time.
        times: How often.
    '''

    def __init__(self, name: str, hook: str, count: int, times: int = 1) -> None:
        self.name, self.left, self.times = name, count, times
        setattr(self, hook, self.send)

    def send(self, trainer, *_, **__):
        if trainer.sanity_checking or Path("sent").exists():
            return
        self.left -= 1
        if self.left == 0:
            Path("sent").touch()
            for _ in range(self.times):
                os.kill(os.getpid(), getattr(signal, self.name))
"""


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Let Ctrl-C count: a shell has what it runs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def signalled(name: str, hook: str, count: int, times: int = 1) -> list[str]:
    """Arguments that let a run be hit by a signal."""
    Path("mine.py").write_text(SIGNAL)
    values = {"name": name, "hook": hook, "count": count, "times": times}
    return [
        "--trainer.callbacks+=mine.Signal",
        *[f"--trainer.callbacks.{key}={value}" for key, value in values.items()],
    ]


WHOLE: dict[str, Any] = {}


@pytest.fixture
def whole(hlbgpt: Callable[..., str], tiny: list[str]) -> Any:
    """Checkpoint and curves of a run that nothing stops; made once, and moved out of the way."""
    if not WHOLE:
        hlbgpt("fit", *QUICKSTART, *tiny, *LONGER)
        WHOLE.update(checkpoint=load_checkpoint(LAST), curves=curves(RUN))
        shutil.rmtree("runs")
    return WHOLE["checkpoint"], WHOLE["curves"]


# Validations after each second step.
LONGER = ["--trainer.max_steps=12", "--trainer.val_check_interval=2", "--data.micro_batches=2"]
SLOW = pytest.mark.slow
OFTEN = "--checkpoint.every_minutes=1e-9"  # a checkpoint after each step


def stop_code(run: Callable[..., str], *arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    ("name", "hook", "count", "step"),
    [
        ("SIGTERM", "on_train_batch_start", 1, 1),  # finishes the step
        pytest.param("SIGTERM", "on_train_batch_start", 2, 2, marks=SLOW),  # and its validation
        ("SIGHUP", "on_train_batch_end", 5, 5),
        pytest.param("SIGTERM", "on_validation_start", 2, 4, marks=SLOW),
        ("SIGINT", "on_validation_batch_end", 3, 4),
        pytest.param("SIGTERM", "on_validation_end", 1, 2, marks=SLOW),
        pytest.param("SIGTERM", "on_before_optimizer_step", 8, 8, marks=SLOW),
    ],
)
def test_a_signal_saves_and_the_run_goes_on_to_the_same_end(
    hlbgpt, tiny, whole, capfd, name: str, hook: str, count: int, step: int
) -> None:
    times = 2 if name == "SIGHUP" else 1  # as a terminal that is closed does
    extra = signalled(name, hook, count, times)
    code = stop_code(hlbgpt, "fit", *QUICKSTART, *tiny, *LONGER, *extra)
    assert code == 128 + getattr(signal, name)
    captured = capfd.readouterr()
    line = f"stopped by {name} after step {step}; resume with: hlbgpt fit --ckpt_path {LAST}"
    line += " --trust"  # of mine.Signal
    assert captured.out.splitlines()[-1] == line
    assert "Traceback" not in captured.err
    assert load_checkpoint(LAST)["global_step"] == step
    assert not (RUN / "record.json").exists()

    out = hlbgpt(*line.split(": hlbgpt ")[1].split())
    assert "target NOT met" in out
    assert [path.name for path in Path("runs/quickstart").iterdir()] == ["version_0"]
    assert json.loads((RUN / "record.json").read_text())["step"] == 12
    checkpoint, lines = whole
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(checkpoint[part], load_checkpoint(LAST)[part], part)
    number_events(RUN)
    assert_same(lines, curves(RUN))


def test_a_signal_in_the_last_validation_lets_the_run_end(hlbgpt, tiny: list[str]) -> None:
    extra = signalled("SIGTERM", "on_validation_start", 6)
    out = hlbgpt("fit", *QUICKSTART, *tiny, *LONGER, *extra)
    assert "target NOT met" in out
    assert (RUN / "record.json").exists()


def test_a_second_signal_stops_at_once(hlbgpt, tiny: list[str], capfd) -> None:
    extra = [OFTEN, *signalled("SIGINT", "on_train_batch_start", 5, times=2)]
    assert stop_code(hlbgpt, "fit", *QUICKSTART, *tiny, *LONGER, *extra) == 130
    assert "resume with" not in capfd.readouterr().out
    assert load_checkpoint(LAST)["global_step"] == 4


def test_curves_are_kept_of_a_run_stopped_at_once_before_its_first_checkpoint(
    hlbgpt, tiny: list[str]
) -> None:
    extra = signalled("SIGINT", "on_train_batch_start", 3, times=2)
    assert stop_code(hlbgpt, "fit", *QUICKSTART, *tiny, *LONGER, *extra) == 130
    assert not LAST.exists()
    assert curves(RUN)["loss/train_loss"]


def test_a_signal_before_the_first_step_leaves_no_folder(hlbgpt, tiny: list[str]) -> None:
    extra = signalled("SIGINT", "on_validation_batch_end", 1)
    Path("mine.py").write_text(SIGNAL.replace("trainer.sanity_checking or ", ""))
    assert stop_code(hlbgpt, "fit", *QUICKSTART, *tiny, *LONGER, *extra) == 130
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_a_text_is_read(hlbgpt, tiny: list[str], capfd, name: str) -> None:
    Path("mine.py").write_text(
        "import os, signal\nfrom hlbgpt.data import TextFiles\n\nclass Slow(TextFiles):\n"
        f"    def chunks(self, split):\n        os.kill(os.getpid(), signal.{name})\n"
        "        yield from super().chunks(split)\n"
    )
    source = ["--data.source=mine.Slow", tiny[1]]
    code = stop_code(hlbgpt, "fit", *QUICKSTART, *tiny[2:], *source)
    assert code == 128 + getattr(signal, name)
    assert capfd.readouterr().err.splitlines()[-1] == f"hlbgpt: stopped by {name}"
    cache = Path(tiny[2].split("=")[1])
    assert names(cache) == []
    assert not Path("runs").exists()


def test_slurms_signal_requeues_the_job_and_the_same_command_resumes_it(
    hlbgpt, tiny, whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"JOB_ID": "77", "NTASKS": "1", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0"}
    job |= {"NODEID": "0", "NTASKS_PER_NODE": "1", "NODELIST": "here", "NNODES": "1"}
    for key, value in job.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.log\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    command = ["fit", *QUICKSTART, *tiny, *LONGER, "--trainer.default_root_dir=job_77"]
    command += signalled("SIGUSR1", "on_train_batch_start", 3)
    assert stop_code(hlbgpt, *command) == 128 + signal.SIGUSR1
    assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"
    hlbgpt(*command)  # as SLURM starts it
    assert_same(
        whole[0]["state_dict"], load_checkpoint("job_77/checkpoints/last.ckpt")["state_dict"]
    )
    number_events(Path("job_77"))
    assert_same(whole[1], curves(Path("job_77")))
    assert not Path("runs").exists()
    with pytest.raises(SystemExit):  # the run has ended
        hlbgpt(*command)


# --- what is typed is what runs ---------------------------------------------------------------


def test_differences_from_the_checkpoint_are_named(hlbgpt, tiny: list[str], capfd) -> None:
    """What is typed runs, but optimizer and schedule continue with the checkpoint's settings."""
    extra = signalled("SIGTERM", "on_train_batch_start", 5)
    assert stop_code(hlbgpt, "fit", *QUICKSTART, *tiny, *LONGER, *extra) == 143
    lower = ["--model.lr_scheduler.max_lr=1e-4", "--model.optimizer.weight_decay=0.7"]
    out = hlbgpt("fit", "--ckpt_path", "last", "--trust", *lower, "--data.micro_batch_size=3")
    named = [line for line in out.splitlines() if line.startswith("resume: ")]
    for difference in (
        "model.optimizer.init_args.weight_decay: 0.1 in the checkpoint, 0.7 now; "
        "a resumed run keeps the checkpoint's",
        "model.lr_scheduler.init_args.max_lr: 0.003 in the checkpoint, 0.0001 now; "
        "a resumed run keeps the checkpoint's",
        "data.micro_batch_size: 4 in the checkpoint, 3 now",
    ):
        assert f"resume: {difference}" in named
    groups = load_checkpoint(LAST)["optimizer_states"][0]["param_groups"]
    decays = {group["name"]: group["weight_decay"] for group in groups}
    assert decays == {"block_matrices": 0.1, "embeddings": 0.0, "vectors": 0.0}
    assert load_checkpoint(LAST)["hlbgpt"]["tokens_seen"] == (5 * 4 + 7 * 3) * 2 * 32
    assert "micro_batch_size: 3" in (RUN / "config.yaml").read_text()
    assert "micro_batch_size: 4" in (RUN / "config.until_step_5.yaml").read_text()


def test_another_optimizer_is_a_new_run(hlbgpt, tiny: list[str], capfd) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny)
    other = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.01"]
    schedule = "--model.lr_scheduler.cycle_momentum=false"
    message = error_of(
        hlbgpt, capfd, "fit", "--ckpt_path", str(LAST), *other, schedule, "--trainer.max_steps=8"
    )
    assert "model.optimizer.class_path: torch.optim.AdamW in the checkpoint, torch.opt" in message
    assert "start a new run" in message


def test_last_is_the_newest_run_of_the_config(hlbgpt, tiny: list[str], capfd) -> None:
    assert "'last' asked for, but no checkpoint is at" in error_of(
        hlbgpt, capfd, "fit", *QUICKSTART, "--ckpt_path=last"
    )
    for steps in (2, 3):
        hlbgpt("fit", *QUICKSTART, *tiny, f"--trainer.max_steps={steps}")
    hlbgpt("fit", *QUICKSTART, *tiny, "--ckpt_path=last", "--trainer.max_steps=5")
    record = json.loads((RUN.parent / "version_2" / "record.json").read_text())
    assert record["tokens"] == 5 * 4 * 32
    assert "val_loss" in hlbgpt("validate", "--ckpt_path", "last")


def test_a_run_that_is_going_on_is_left_alone(hlbgpt, tiny: list[str], capfd) -> None:
    extra = signalled("SIGTERM", "on_train_batch_start", 5)
    assert stop_code(hlbgpt, "fit", *QUICKSTART, *tiny, *LONGER, *extra) == 143
    with exclusive(RUN):
        message = error_of(hlbgpt, capfd, "fit", "--ckpt_path", "last", "--trust")
    assert f"the run in {RUN} is still going on in another process" in message
    hlbgpt("fit", "--ckpt_path", "last", "--trust")


def test_a_run_killed_before_its_record_gets_one(hlbgpt, tiny: list[str]) -> None:
    """Whether its target was met or not; nothing is trained twice."""
    met_at_the_last_step = ["--time_to_target.target=9", "--trainer.val_check_interval=4"]
    for extra in ([], ["--time_to_target.target=9"], met_at_the_last_step):
        hlbgpt("fit", *QUICKSTART, *tiny, *extra)
        run = max(Path("runs/quickstart").iterdir())
        record = json.loads((run / "record.json").read_text())
        (run / "record.json").unlink()
        hlbgpt("fit", "--ckpt_path", run / "checkpoints" / "last.ckpt")
        again = json.loads((run / "record.json").read_text())
        for key in ("reached", "step", "tokens", "step_tokens", "value", "value_step"):
            assert again[key] == record[key]
    assert len(list(Path("runs/quickstart").iterdir())) == 3


def test_a_typed_folder_is_expanded_and_never_overwritten(
    hlbgpt, tiny: list[str], capfd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    command = ["fit", *QUICKSTART, *tiny, "--trainer.default_root_dir=~/mine"]
    hlbgpt(*command)
    assert (tmp_path / "home/mine/record.json").is_file()
    assert "mine' holds another run; name another folder" in error_of(hlbgpt, capfd, *command)
    checkpoint = "~/mine/checkpoints/last.ckpt"
    assert "val_loss" in hlbgpt("validate", "--ckpt_path", checkpoint)
    assert "val_loss" in hlbgpt("validate", *QUICKSTART, *tiny, "--ckpt_path", checkpoint)


def test_a_run_killed_before_its_first_checkpoint_leaves_no_curves_to_the_next(
    hlbgpt, tiny: list[str]
) -> None:
    extra = signalled("SIGINT", "on_train_batch_start", 3, times=2)
    command = ["fit", *QUICKSTART, *tiny, "--trainer.default_root_dir=mine", *extra]
    assert stop_code(hlbgpt, *command) == 130
    hlbgpt(*command)
    number_events(Path("mine"))
    assert [step for step, _ in curves(Path("mine"))["loss/train_loss"]] == [1, 2, 3, 4]


def test_a_run_at_its_last_token_is_over(hlbgpt, tiny: list[str], capfd) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny, "--data.max_tokens=300")
    message = error_of(hlbgpt, capfd, "fit", "--ckpt_path", str(LAST))
    assert "data.max_tokens (or the end of schedule.table): 300, but" in message
