"""What a Lightning user tries on the first day: loggers, callbacks, names of runs, first words."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CONFIGS, LAST, QUICKSTART, RUN
from helpers import read_record
from lightning.pytorch.callbacks import RichProgressBar
from test_bad_input import error_of
from test_python import settings

import hlbgpt as package
from hlbgpt import LanguageModule, TimeToTarget, TokenDataModule, fit

MINE = """
import collections, pathlib
import numpy as np
import lightning as L
from lightning.pytorch.loggers import CSVLogger
from hlbgpt.callbacks import LastCheckpoint, Milestone, TimeToTarget


class Second(TimeToTarget):
    def is_met(self, value):
        return super().is_met(value) and self._values[-2:-1] != []


class Saves(LastCheckpoint):
    pass


class Keeps(L.Callback):
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def state_dict(self):
        kinds = {"path": pathlib.Path("x"), "numpy": np.float64(1), "lambda": lambda: 1}
        return {"kept": {**kinds, "defaultdict": collections.defaultdict(int)}[self.kind]}


class Ready(L.Callback):
    def on_train_start(self, trainer, pl_module):
        self.ready = 1

    def state_dict(self):
        return {"ready": self.ready}


class Later(L.Callback):
    found = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            self.found = pathlib.Path("x")

    def state_dict(self):
        return {"found": self.found}


class Broken(L.Callback):
    def __init__(self) -> None:
        raise KeyError("no such thing")


class NoPackage(CSVLogger):
    def __init__(self) -> None:
        import no_such_package


class Words(L.Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("words", 7.0)


class Alone(Milestone):
    def __init__(self) -> None:
        super().__init__(2.0)


class SetsRate(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 0.0
"""


@pytest.fixture
def mine(hlbgpt: Callable[..., str]) -> None:
    """Classes of a user's own in the current folder."""
    Path("mine.py").write_text(MINE)


# --- the run's folder and loggers -----------------------------------------------------------------

CSV = "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"
LOGGERS = {
    "csv": CSV,
    "more": ("--trainer.logger+=CSVLogger", "--trainer.logger.save_dir=logs"),
    "board": ("--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=logs"),
    "list": ("--trainer.logger=[{class_path: CSVLogger, init_args: {save_dir: logs}}]",),
    "none": ("--trainer.logger=false",),
    "null": ("--trainer.logger=null",),
    "true": ("--trainer.logger=true",),
}


@pytest.mark.parametrize("name", LOGGERS)
def test_the_folder_of_a_run_does_not_depend_on_its_logger(
    hlbgpt: Callable[..., str], tiny: list[str], name: str
) -> None:
    for _ in range(2):
        hlbgpt("fit", *QUICKSTART, *tiny, *LOGGERS[name], "--trainer.max_steps=2")
    for folder in (RUN, RUN.with_name("version_1")):
        assert read_record(folder)["step"] == 2
        assert (folder / "checkpoints" / "last.ckpt").is_file()
        assert bool(list(folder.glob("events*"))) == (name in ("more", "null", "true"))
    assert Path("logs").exists() == (name not in ("none", "null", "true"))
    assert len(list(Path("runs/quickstart").iterdir())) == 2
    hlbgpt("fit", "--ckpt_path=last", "--trainer.max_steps=3")
    assert read_record(RUN.with_name("version_2"))["step"] == 3


def test_runs_are_named_by_the_user(hlbgpt, tiny: list[str], capfd) -> None:
    named = [*QUICKSTART, *tiny, "--run_name=wide"]
    hlbgpt("fit", *named)
    assert read_record(Path("runs/wide/version_0"))["step"] == 4
    hlbgpt("fit", *QUICKSTART, *tiny, "--trainer.max_steps=2")
    assert "runs/wide" in hlbgpt("fit", *named, "--ckpt_path=last", "--trainer.max_steps=6")
    assert read_record(Path("runs/wide/version_1"))["step"] == 6
    hlbgpt("validate", "--run_name=wide", "--ckpt_path=last")
    for name in ("a/b", "..", " "):
        message = error_of(hlbgpt, capfd, "fit", *named, f"--run_name={name}")
        assert f"run_name: {name!r} is no name of a folder" in message


def test_last_of_a_folder_of_the_users_own(hlbgpt, tiny: list[str]) -> None:
    root = "--trainer.default_root_dir=job"
    hlbgpt("fit", *QUICKSTART, *tiny, root)
    hlbgpt("fit", *QUICKSTART, *tiny, "--trainer.max_steps=2")
    assert "val_loss" in hlbgpt("validate", "--ckpt_path=last", root)
    (Path("job") / "record.json").unlink()
    hlbgpt("fit", "--ckpt_path=last", root)
    assert read_record(Path("job"))["step"] == 4


# --- callbacks that every run has -----------------------------------------------------------------


def test_the_clock_is_replaced_by_a_subclass(hlbgpt, mine, tiny: list[str]) -> None:
    """In all the forms in which a class can be named."""
    Path("more.yaml").write_text("time_to_target: {target: 9}")
    Path("whole.yaml").write_text(
        "time_to_target: {class_path: mine.Second, init_args: {target: 9}}"
    )
    for extra in (
        ["--time_to_target=mine.Second", "--time_to_target.target=9"],
        ["--config=more.yaml", "--time_to_target=mine.Second"],
        ["--config=whole.yaml"],
    ):
        out = hlbgpt("fit", *QUICKSTART, *tiny, *extra)
        assert out.count("target met") == 1
        (folder,) = Path("runs").glob("*/version_*")
        record = read_record(folder)
        shutil.rmtree("runs")
        assert (record["reached"], record["step"], record["target"]) == (True, 4, 9.0)


def test_callbacks_are_left_out_by_null(hlbgpt, tiny: list[str]) -> None:
    every = ("time_to_target", "checkpoint", "divergence", "console", "schedule")
    for key in every:
        hlbgpt("fit", *QUICKSTART, *tiny, f"--{key}=null")
        folder = max(Path("runs/quickstart").iterdir())
        assert (folder / "record.json").exists() == (key != "time_to_target")
        assert (folder / "checkpoints").exists() == (key != "checkpoint")
    out = hlbgpt("fit", *QUICKSTART, *tiny, *[f"--{key}=null" for key in every])
    assert "step" not in out
    config = yaml.safe_load((max(Path("runs/quickstart").iterdir()) / "config.yaml").read_text())
    assert [config[key] for key in every] == [None] * 5
    run = fit(CONFIGS / "quickstart.yaml", settings(tiny) | {"time_to_target": None})
    assert run.record == {}


def test_another_progress_bar_under_the_key(hlbgpt, tiny: list[str]) -> None:
    out = hlbgpt("fit", *QUICKSTART, *tiny, "--console=RichProgressBar")
    assert "Epoch" in out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--trainer.callbacks+=mine.Second"], "Second is a second TimeToTarget; take it out and"),
        (["--trainer.callbacks+=mine.Second"], "--time_to_target mine.Second"),
        (["--trainer.callbacks+=mine.Saves"], "Saves is a second LastCheckpoint; take it out"),
        (
            ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"],
            "ModelCheckpoint save_last: every run saves last.ckpt already",
        ),
        (
            ["--trainer.callbacks+=mine.Keeps", "--trainer.callbacks.kind=path"],
            "callback Keeps: its state holds pathlib.PosixPath, with which no checkpoint could be",
        ),
        (["--trainer.callbacks+=mine.Keeps", "--trainer.callbacks.kind=numpy"], "numpy.dtype"),
        (["--trainer.callbacks+=mine.Keeps", "--trainer.callbacks.kind=lambda"], "Keeps: its"),
        (
            ["--trainer.callbacks+=mine.Keeps", "--trainer.callbacks.kind=defaultdict"],
            "callback Keeps: its state holds builtins.int, collections.defaultdict",
        ),
        (["--trainer.callbacks+=mine.Broken"], "KeyError: 'no such thing'"),
        (["--trainer.logger=mine.NoPackage"], "ModuleNotFoundError: No module named 'no_such_"),
        (["--trainer.logger+=mine.NoPackage"], "ModuleNotFoundError: No module named 'no_such_"),
        pytest.param(
            ["--trainer.logger=WandbLogger"],
            "WandbLogger: ModuleNotFoundError: ",
            marks=pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed"),
        ),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_los"],
            "EarlyStopping: no metric 'val_los' is logged, which it monitors; choose one of",
        ),
        (
            ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val_los"],
            "ModelCheckpoint: no metric 'val_los' is logged, which it monitors; choose one of",
        ),
        (
            ["--model.lr_scheduler.total_steps=20", "--trainer.max_steps=20"],
            "model.lr_scheduler: float division by zero; change",
        ),
        (["--trainer.max_step=3"], "unrecognized arguments: --trainer.max_step=3"),
        (["--trainer.overfit_batches=2"], "trainer.overfit_batches: 2, but training batches"),
        (
            ["--trainer.callbacks+=mine.Alone", "--time_to_target=null"],
            "Alone: the run has no time_to_target, whose clock it reads",
        ),
    ],
)
def test_what_cannot_work_is_one_line(
    hlbgpt, mine, tiny: list[str], capfd, extra: list[str], message: str
) -> None:
    sanity = "--trainer.num_sanity_val_steps=1"
    assert message in error_of(hlbgpt, capfd, "fit", *QUICKSTART, *tiny, sanity, *extra)
    assert not Path("runs").exists()


def test_a_state_that_cannot_be_read_again_does_not_replace_the_last_checkpoint(
    hlbgpt, mine, tiny: list[str], capfd
) -> None:
    every_step = "--checkpoint.every_minutes=1e-9"
    with pytest.raises(SystemExit):
        hlbgpt("fit", *QUICKSTART, *tiny, every_step, "--trainer.callbacks+=mine.Later")
    assert "callback Later: its state holds pathlib.PosixPath" in capfd.readouterr().err
    hlbgpt("validate", "--ckpt_path", LAST, "--trust")
    assert torch.load(LAST, weights_only=True)["global_step"] == 2


def test_a_state_that_is_made_when_training_starts(hlbgpt, mine, tiny: list[str]) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny, "--trainer.callbacks+=mine.Ready")
    assert torch.load(LAST, weights_only=True)["callbacks"]["Ready"] == {"ready": 1}


def test_one_callback_in_place_of_a_list_and_none(hlbgpt, tiny: list[str]) -> None:
    Path("one.yaml").write_text("trainer: {callbacks: {class_path: LearningRateMonitor}}")
    Path("none.yaml").write_text("trainer: {callbacks: null}")
    for name in ("one", "none"):
        hlbgpt("fit", *QUICKSTART, f"--config={name}.yaml", *tiny)


def test_milestones_are_met_without_stopping_the_run(hlbgpt, tiny: list[str]) -> None:
    """And survive a resume."""
    Path("more.yaml").write_text(
        "trainer:\n  callbacks+:\n"
        "  - {class_path: Milestone, init_args: {target: 9}}\n"
        "  - {class_path: Milestone, init_args: {target: 0.001}}\n"
        "  - {class_path: Milestone, "
        "init_args: {target: 0.0001, monitor: val_accuracy, mode: max}}\n"
    )
    words = ["fit", *QUICKSTART, "--config=more.yaml", "--run_name=quickstart", *tiny]
    assert hlbgpt(*words).count("milestone: ") == 2
    loss, never, accuracy = read_record(RUN)["milestones"]
    assert (loss["reached"], loss["step"], loss["tokens"]) == (True, 2, 2 * 4 * 32)
    assert 0 < loss["train_seconds"] < read_record(RUN)["train_seconds"]
    assert never == {"monitor": "val_loss", "target": 0.001, "mode": "min", "reached": False}
    assert accuracy["reached"]
    assert "milestone: " not in hlbgpt(*words, f"--ckpt_path={LAST}", "--trainer.max_steps=6")
    assert read_record(RUN.with_name("version_1"))["milestones"] == [loss, never, accuracy]


def test_targets_on_another_metric(hlbgpt, mine, tiny: list[str]) -> None:
    words = ["--trainer.callbacks+=mine.Words", "--time_to_target.mode=max"]
    for monitor, target in {"val_accuracy": 0.0001, "words": 7}.items():
        target_of = [f"--time_to_target.monitor={monitor}", f"--time_to_target.target={target}"]
        out = hlbgpt("fit", *QUICKSTART, *tiny, *words, *target_of)
        assert f"target met: {monitor}" in out


def test_a_rate_set_by_a_callback_is_used(hlbgpt, mine, tiny: list[str]) -> None:
    """Under a schedule too: it sets the rate after a step, before the callback's hook."""
    for steps in (1, 4):
        rate = ["--trainer.callbacks+=mine.SetsRate", f"--trainer.max_steps={steps}"]
        hlbgpt("fit", *QUICKSTART, *tiny, *rate)
    first, last = (
        torch.load(path, weights_only=True)["state_dict"]["net.embedding.weight"]
        for path in (LAST, RUN.with_name("version_1") / "checkpoints" / "last.ckpt")
    )
    assert torch.equal(first, last)


# --- first words ----------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["--version"], []])
def test_help_and_version_import_nothing_heavy(words: list[str]) -> None:
    code = (
        f"import sys; from hlbgpt.__main__ import main; main({words}); "
        "assert not {'torch', 'lightning', 'jsonargparse'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hlbgpt" in done.stdout
    assert ("torch 2" in done.stdout) == (words == ["--version"])


def test_typed_options_win_over_config_files_that_follow(hlbgpt, tiny: list[str]) -> None:
    Path("steps.yaml").write_text("trainer: {max_steps: 3}")
    hlbgpt("fit", *tiny, "--trainer.max_steps=2", "-c", "steps.yaml", *QUICKSTART)
    assert read_record(RUN)["step"] == 2


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_measuring_needs_a_checkpoint(hlbgpt, tiny: list[str], capfd, command: str) -> None:
    for words in ([], [*QUICKSTART, *tiny]):
        message = error_of(hlbgpt, capfd, command, *words)
        assert f"ckpt_path: not given, so `{command}` would use a network that was" in message
    message = error_of(hlbgpt, capfd, command, "--ckpt_path=typo.ckpt")
    assert "ckpt_path: no file 'typo.ckpt'; name a checkpoint" in message
    Path("a.ckpt").write_text("x")
    message = error_of(hlbgpt, capfd, command, "--ckpt_path=a.ckpt")
    assert "a.ckpt' is incomplete, is no checkpoint, or contains code" in message


# --- from Python ----------------------------------------------------------------------------------


def test_fit_takes_one_callback_and_paths(hlbgpt, tiny: list[str]) -> None:
    bar = RichProgressBar()
    folder: Any = {"trainer.default_root_dir": Path("here")}
    run = fit(CONFIGS / "quickstart.yaml", settings(tiny) | folder, callbacks=bar)
    assert run.folder == Path("here").absolute()
    assert json.loads((run.folder / "record.json").read_text())["step"] == 4


def test_the_parts_can_be_imported_and_called(hlbgpt, tiny: list[str]) -> None:
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    hlbgpt("fit", *QUICKSTART, *tiny)
    model = package.PretrainedModel.from_checkpoint(LAST)
    module = LanguageModule(model.net, lambda groups: torch.optim.SGD(groups, lr=0.1))
    tokens = torch.randint(256, (2, 8))
    assert torch.equal(module(tokens), model.net(tokens))
    exported = torch.export.export(module.eval(), (tokens,)).module()
    torch.testing.assert_close(exported(tokens), model.net(tokens))
    assert issubclass(TimeToTarget, package.TimeToTarget)
    assert issubclass(TokenDataModule, package.TokenDataModule)
