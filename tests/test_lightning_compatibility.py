"""Every callback and every trainer setting of Lightning, and what happens when it is used.

The two tables are meant to be read. Each row is run for 4 steps of 128 tokens, with a validation
every 2 steps: it works, with the effect that the row states, or is refused in one line before
training. A new version of Lightning that adds a callback or a setting fails the last test.
"""

import csv
import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from conftest import LAST, QUICKSTART, RUN
from helpers import make, read_record, sgd
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from test_bad_input import error_of

from hlbgpt.callbacks import LastCheckpoint, TimeToTarget
from hlbgpt.generation import PretrainedModel
from hlbgpt.models import token_scores

# What a user would write: classes and functions in a file of the current folder.
MINE = """
from pathlib import Path
import lightning as L
import torch
from lightning.pytorch.callbacks import BaseFinetuning, BasePredictionWriter, ProgressBar

class FreezeEmbedding(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net.embedding)
        self.before = pl_module.net.embedding.weight.clone()

    def finetune_function(self, pl_module, epoch, optimizer):
        pass

    def on_train_end(self, trainer, pl_module):
        print("embedding unchanged:", bool((pl_module.net.embedding.weight == self.before).all()))

class WriteTexts(BasePredictionWriter):
    def write_on_batch_end(self, trainer, pl_module, prediction, *_):
        Path("texts.txt").write_text("".join(prediction))

class Bar(ProgressBar):
    is_enabled = True

    def on_train_batch_end(self, trainer, *_):
        print("bar:", trainer.global_step)

class NoBar(ProgressBar):
    pass

class Fails(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            raise RuntimeError("mine")

class OnDevice(L.Callback):
    def __init__(self, device: torch.device | None = torch.device("cpu")) -> None:
        pass

def say(trainer, pl_module):
    print("said after step", trainer.global_step)

def windows(batch):
    return batch.shape[:-1].numel()

def tokens(batch):
    return batch[..., 1:].numel()
"""


class Ran:
    """What a run has left."""

    def __init__(self, out: str, hlbgpt: Callable[..., str]) -> None:
        self.out, self.hlbgpt = out, hlbgpt

    @property
    def record(self) -> dict[str, Any]:
        return read_record(RUN)

    @property
    def steps(self) -> list[int]:
        """The steps after which there was a validation."""
        lines = self.out.splitlines()
        return [int(line.split()[1]) for line in lines if line.startswith("step ")]

    @property
    def weights(self) -> torch.Tensor:
        state = torch.load(LAST, weights_only=True)["state_dict"]
        return torch.cat([value.flatten() for value in state.values()])

    def logged(self, name: str) -> list[float]:
        (path,) = Path("csv").rglob("metrics.csv")
        with path.open() as file:
            return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]

    def validated(self) -> float:
        """The loss that `hlbgpt validate` finds for last.ckpt, to 4 digits."""
        out = self.hlbgpt("validate", "--ckpt_path=last")
        return float(out.split(" val_loss ")[1].split("│")[1])


class Row(NamedTuple):
    """One way to use a callback or a setting."""

    name: str
    words: list[str]
    refused: str = ""  # what the one line says; works if empty
    effect: Callable[[Ran], Any] = lambda run: run.record["step"] == 4
    needs: str = ""  # a package, without which the line is said
    own_process: bool = False  # it forks, which a process with threads must not


def cb(name: str, **settings: Any) -> list[str]:
    """A callback as it is given on the command line."""
    values = [f"--trainer.callbacks.{key}={value}" for key, value in settings.items()]
    return [f"--trainer.callbacks+={name}", *values]


def tr(**settings: Any) -> list[str]:
    """Settings of the trainer as they are given on the command line."""
    return [f"--trainer.{key}={value}" for key, value in settings.items()]


def saved(*names: str) -> Callable[[Ran], bool]:
    """These files and no others are in the folder `kept`."""
    return lambda run: sorted(path.name for path in Path("kept").iterdir()) == sorted(names)


def says(text: str) -> Callable[[Ran], bool]:
    return lambda run: text in run.out


def ends_after(step: int) -> Callable[[Ran], bool]:
    return lambda run: run.record["step"] == step and LAST.exists()


NO_END = "training batches are drawn without end"
KEPT = {"dirpath": "kept", "filename": "{step}"}
UNFUSED = ["--model.optimizer.fused=false"]  # Lightning clips no fused optimizer in 16 bits

CALLBACKS = [
    # It wants a network in two parts; write a BaseFinetuning for the parts of yours.
    Row("BackboneFinetuning", cb("BackboneFinetuning"), "BackboneFinetuning: AttributeError: "),
    # `freeze_before_training` works; `finetune_function` is called once, since there is one epoch.
    Row("BaseFinetuning", cb("mine.FreezeEmbedding"), effect=says("embedding unchanged: True")),
    Row("BaseFinetuning", cb("BaseFinetuning"), "BaseFinetuning: NotImplementedError"),
    Row(
        "BasePredictionWriter",
        cb("mine.WriteTexts", write_interval="batch"),
        effect=lambda run: (
            run.hlbgpt("predict", "--ckpt_path=last", "--trust", "--data.prompts=The ").strip()
            == Path("texts.txt").read_text().strip()
        ),
    ),
    Row("BatchSizeFinder", cb("BatchSizeFinder"), "set data.micro_batch_size for the memory"),
    Row("Callback", cb("Callback")),
    Row("Checkpoint", cb("Checkpoint")),
    Row(
        "DeviceStatsMonitor", cb("DeviceStatsMonitor"), "`psutil` is not installed", needs="psutil"
    ),
    Row("EarlyStopping", cb("EarlyStopping", monitor="val_loss")),
    Row(
        "EarlyStopping",
        cb("EarlyStopping", monitor="val_loss", stopping_threshold=9),
        effect=ends_after(2),
    ),
    # At the end of an epoch, which is the end of training, it has nothing left to stop.
    Row(
        "EarlyStopping",
        cb(
            "EarlyStopping",
            monitor="train_loss",
            stopping_threshold=9,
            check_on_train_epoch_end="true",
        ),
    ),
    Row(
        "EarlyStopping",
        cb("EarlyStopping", monitor="loss"),
        "EarlyStopping: no metric 'loss' is logged, which it monitors; choose one of",
    ),
    # Validation, record and last.ckpt are of the averaged weights.
    Row(
        "EMAWeightAveraging",
        cb("EMAWeightAveraging", decay=0.5),
        effect=lambda run: run.validated() == pytest.approx(run.record["value"], abs=1e-9),
    ),
    Row(
        "GradientAccumulationScheduler",
        cb("GradientAccumulationScheduler", scheduling="{0: 2}"),
        effect=lambda run: run.record["tokens"] == 4 * 2 * 128,
    ),
    Row(
        "GradientAccumulationScheduler",
        cb("GradientAccumulationScheduler", scheduling="{3: 2}"),
        "it changes after an epoch, and training is one epoch without end; use schedule.table",
    ),
    Row(
        "GradientAccumulationScheduler",
        [
            *cb("GradientAccumulationScheduler", scheduling="{0: 2}"),
            "--data.micro_batches=2",
        ],
        "both split a step into micro-batches",
    ),
    Row(
        "LambdaCallback",
        cb("LambdaCallback", on_train_end="mine.say"),
        effect=says("said after step 4"),
    ),
    Row("LearningRateFinder", cb("LearningRateFinder"), "set model.optimizer.init_args.lr"),
    Row(
        "LearningRateMonitor",
        cb("LearningRateMonitor", log_momentum="true", log_weight_decay="true"),
        effect=lambda run: len(run.logged("lr-AdamW/block_matrices")) == 4,
    ),
    Row(
        "ModelCheckpoint",
        cb("ModelCheckpoint", monitor="val_loss", **KEPT),
        effect=saved("step=4.ckpt"),
    ),
    Row(
        "ModelCheckpoint",
        cb("ModelCheckpoint", monitor="train_loss", every_n_train_steps=1, save_top_k=-1, **KEPT),
        effect=saved(*(f"step={step}.ckpt" for step in (1, 2, 3, 4))),
    ),
    # The newest two.
    Row(
        "ModelCheckpoint",
        cb(
            "ModelCheckpoint",
            monitor="step",
            mode="max",
            every_n_train_steps=1,
            save_top_k=2,
            **KEPT,
        ),
        effect=saved("step=3.ckpt", "step=4.ckpt"),
    ),
    Row(
        "ModelCheckpoint",
        cb("ModelCheckpoint", every_n_train_steps=1, save_top_k=2),
        "ModelCheckpoint(save_top_k=2, monitor=None) is not a valid configuration",
    ),
    # An epoch here is the time between two validations.
    Row(
        "ModelCheckpoint",
        cb("ModelCheckpoint", every_n_epochs=1, save_top_k=-1, **KEPT),
        effect=saved("step=2.ckpt", "step=4.ckpt"),
    ),
    Row(
        "ModelCheckpoint",
        cb("ModelCheckpoint", train_time_interval="0:00:00.001", save_top_k=-1, **KEPT),
        effect=lambda run: Path("kept/step=1.ckpt").is_file(),
    ),
    Row(
        "ModelCheckpoint",
        cb("ModelCheckpoint", save_weights_only="true", **KEPT),
        effect=lambda run: (
            "val_loss"
            in run.hlbgpt("validate", "--ckpt_path=kept/step=4.ckpt", f"--config={RUN}/config.yaml")
        ),
    ),
    Row(
        "ModelCheckpoint",
        cb("ModelCheckpoint", save_last="true", **KEPT),
        effect=saved("last.ckpt", "step=4.ckpt"),
    ),
    Row(
        "ModelCheckpoint",
        [*cb("ModelCheckpoint", save_last="true"), *tr(logger="false")],
        "ModelCheckpoint save_last: every run saves last.ckpt already",
    ),
    # Prunes when training ends: last.ckpt is pruned, the record's loss is of the weights before.
    Row(
        "ModelPruning",
        cb("ModelPruning", pruning_fn="l1_unstructured", amount=0.5),
        effect=lambda run: (
            (run.weights == 0).double().mean().item() == pytest.approx(0.5, abs=0.1)
            and run.validated() > run.record["value"]
        ),
    ),
    Row("ModelSummary", cb("ModelSummary", max_depth=2)),
    # A run that fails leaves this one besides last.ckpt; see the test below.
    Row("OnExceptionCheckpoint", cb("OnExceptionCheckpoint", dirpath="crash")),
    Row("ProgressBar", cb("mine.Bar"), effect=says("bar: 4")),
    Row("ProgressBar", cb("mine.NoBar"), "NoBar: it has no is_enabled, which Lightning's print"),
    Row("RichModelSummary", cb("RichModelSummary"), effect=says("Total params")),
    Row("RichProgressBar", cb("RichProgressBar"), effect=says("Epoch 0")),
    # It reads the loss of the step's last micro-batch, divided by their number.
    Row("SpikeDetection", cb("SpikeDetection")),
    Row(
        "SpikeDetection",
        cb("SpikeDetection", mode="max", rtol=0),
        "SpikeDetection: TrainingSpikeException: Training spike detected in batch",
    ),
    Row(
        "StochasticWeightAveraging",
        cb("StochasticWeightAveraging", swa_lrs=0.1),
        "it averages at the ends of epochs, and training is one epoch without end; use Weight",
    ),
    Row(
        "ThroughputMonitor",
        cb(
            "ThroughputMonitor",
            batch_size_fn="mine.windows",
            length_fn="mine.tokens",
            window_size=2,
        ),
        effect=lambda run: (
            run.logged("train/device/flops_per_sec")[-1]
            / run.logged("train/device/items_per_sec")[-1]
            == pytest.approx(run.record["flops_per_token"])
        ),
    ),
    Row("Timer", cb("Timer", duration="00:01:00:00")),
    Row("Timer", cb("Timer", duration="00:00:00:00"), effect=lambda run: run.record["step"] == 0),
    Row("TQDMProgressBar", cb("TQDMProgressBar"), effect=says("Epoch 0: 100%")),
    Row(
        "WeightAveraging",
        cb("WeightAveraging"),
        effect=lambda run: run.validated() == pytest.approx(run.record["value"], abs=1e-9),
    ),
]

TRAINER = [
    Row("accelerator", tr(accelerator="auto")),
    Row("accelerator", tr(accelerator="tpu"), "torch_xla", needs="torch_xla"),
    Row("strategy", tr(strategy="ddp")),
    Row("strategy", tr(strategy="ddp_notebook"), own_process=True),
    Row("strategy", tr(strategy="ddp_spawn"), "'ddp_spawn' would send a run that is already built"),
    Row("strategy", tr(strategy="fsdp"), "'fsdp' is not supported"),
    Row("strategy", tr(strategy="deepspeed"), "'deepspeed' is not supported"),
    Row("devices", tr(devices="auto", strategy="auto"), effect=lambda r: r.record["devices"] == 1),
    # With more, Lightning waits until as many have been started.
    Row("num_nodes", tr(num_nodes=1)),
    Row("precision", tr(precision="32-true")),
    Row("precision", tr(precision="bf16-mixed")),
    # bf16-mixed on a CPU, as Lightning warns.
    Row(
        "precision",
        tr(precision="16-mixed"),
        effect=lambda r: r.record["precision"] == "bf16-mixed",
    ),
    # Losses are added up in double precision all the same; see the test below.
    Row("precision", tr(precision="bf16-true")),
    Row("precision", tr(precision="16-true")),
    Row("precision", tr(precision="64-true")),
    Row(
        "precision",
        tr(precision="transformer-engine"),
        "'transformer_engine>=0.11.0' not met",
        needs="transformer_engine",
    ),
    Row("logger", tr(logger="CSVLogger") + tr(**{"logger.save_dir": "csv"})),
    Row(
        "logger",
        tr(logger="TensorBoardLogger") + tr(**{"logger.save_dir": "board"}),
        effect=lambda run: list(Path("board").rglob("events*")),
    ),
    Row("logger", tr(logger="true"), effect=lambda run: list(RUN.glob("events*"))),
    Row("logger", tr(logger="false"), effect=lambda run: not list(RUN.glob("events*"))),
    Row("logger", tr(logger="WandbLogger"), "Requirement 'wandb", needs="wandb"),
    Row("logger", tr(logger="MLFlowLogger"), "Requirement 'mlflow", needs="mlflow"),
    Row("logger", tr(logger="CometLogger"), "Requirement 'comet-ml", needs="comet_ml"),
    # Lightning 2.6 has no such class any more.
    Row("logger", tr(logger="NeptuneLogger"), 'key "trainer.logger": ', needs="neptune"),
    Row("logger", tr(logger="LitLogger"), 'key "trainer.logger": ', needs="litlogger"),
    Row("callbacks", tr(callbacks="LearningRateMonitor")),
    Row("callbacks", tr(callbacks="null")),
    # A trial that leaves nothing behind.
    Row("fast_dev_run", tr(fast_dev_run=3), effect=lambda r: r.steps == [3] and not RUN.exists()),
    Row("max_epochs", tr(max_epochs=2), f"trainer.max_epochs: 2, but {NO_END}; set"),
    Row("min_epochs", tr(min_epochs=1), "they would keep a run from stopping at its target"),
    Row("max_steps", tr(max_steps=3), effect=ends_after(3)),
    Row(
        "max_steps",
        [*tr(max_steps=-1), "--data.max_tokens=300", "--model.lr_scheduler=null"],
        effect=ends_after(3),
    ),
    Row("min_steps", tr(min_steps=2), "they would keep a run from stopping at its target"),
    Row("max_time", tr(max_time="00:00:00:00"), effect=lambda run: run.record["step"] == 0),
    Row("max_time", tr(max_time="{hours: 1}")),
    Row(
        "limit_train_batches",
        tr(limit_train_batches=2),
        f"trainer.limit_train_batches: 2, but {NO_END}",
    ),
    Row("limit_train_batches", tr(limit_train_batches=0.5), f"0.5, but {NO_END}"),
    Row("limit_val_batches", tr(limit_val_batches=2)),
    Row("limit_val_batches", tr(limit_val_batches=0), effect=lambda r: r.record["value"] is None),
    Row("limit_test_batches", tr(limit_test_batches=1)),
    Row("limit_predict_batches", tr(limit_predict_batches=1)),
    Row("overfit_batches", tr(overfit_batches=1), f"trainer.overfit_batches: 1, but {NO_END}"),
    Row("overfit_batches", tr(overfit_batches=0.5), f"trainer.overfit_batches: 0.5, but {NO_END}"),
    Row("val_check_interval", tr(val_check_interval=3), effect=lambda run: run.steps == [3, 4]),
    # Once, when training ends.
    Row("val_check_interval", tr(val_check_interval=1.0), effect=lambda run: run.steps == [4]),
    Row("val_check_interval", tr(val_check_interval=0.5), "0.5 is not a number of steps"),
    Row("val_check_interval", tr(val_check_interval="00:00:00:01"), "is not a number of steps"),
    Row(
        "check_val_every_n_epoch",
        tr(check_val_every_n_epoch="null"),
        effect=lambda r: r.steps == [2, 4],
    ),
    Row("check_val_every_n_epoch", tr(check_val_every_n_epoch=2), "but there are no epochs"),
    Row("num_sanity_val_steps", tr(num_sanity_val_steps=-1), effect=lambda r: r.steps == [2, 4]),
    Row("num_sanity_val_steps", tr(num_sanity_val_steps=0)),
    Row(
        "log_every_n_steps",
        tr(log_every_n_steps=2),
        effect=lambda r: len(r.logged("train_loss")) == 2,
    ),
    Row(
        "enable_checkpointing",
        tr(enable_checkpointing="false"),
        effect=lambda run: not LAST.exists(),
    ),
    Row("enable_checkpointing", tr(enable_checkpointing="true"), effect=ends_after(4)),
    Row("enable_progress_bar", tr(enable_progress_bar="false")),
    Row("enable_progress_bar", tr(enable_progress_bar="true")),
    Row("enable_model_summary", tr(enable_model_summary="true"), effect=says("Total params")),
    # Where a batch is one micro-batch; data.micro_batches does the same and resumes exactly.
    Row(
        "accumulate_grad_batches",
        tr(accumulate_grad_batches=2),
        effect=lambda run: run.record["tokens"] == 4 * 2 * 128,
    ),
    Row(
        "accumulate_grad_batches",
        [*tr(accumulate_grad_batches=2), "--data.micro_batches=2"],
        "both split a step into micro-batches",
    ),
    Row("gradient_clip_val", tr(gradient_clip_val=1.0)),
    Row("gradient_clip_val", tr(gradient_clip_val=1.0, precision="bf16-mixed") + UNFUSED),
    Row(
        "gradient_clip_val",
        tr(gradient_clip_val=1.0, precision="bf16-mixed"),
        "clips no gradients of a fused optimizer in bf16-mixed; set",
    ),
    Row("gradient_clip_algorithm", tr(gradient_clip_val=1.0, gradient_clip_algorithm="value")),
    Row("deterministic", tr(deterministic="true")),
    Row("deterministic", tr(deterministic="warn")),
    Row("benchmark", tr(benchmark="true")),
    Row("inference_mode", tr(inference_mode="false")),
    # The loaders share out their windows themselves.
    Row("use_distributed_sampler", tr(use_distributed_sampler="false")),
    Row("profiler", tr(profiler="simple")),
    Row("profiler", tr(profiler="advanced")),
    Row("profiler", tr(profiler="pytorch")),
    Row("detect_anomaly", tr(detect_anomaly="true")),
    Row("barebones", tr(barebones="true"), "trainer.barebones: it logs no metrics"),
    # Then checkpoints are written in the way of the plugin, not atomically.
    Row("plugins", tr(plugins="AsyncCheckpointIO"), effect=ends_after(4)),
    # There is nothing of the kind in the networks, nor an epoch after which to load anew.
    Row("sync_batchnorm", tr(sync_batchnorm="true")),
    Row("reload_dataloaders_every_n_epochs", tr(reload_dataloaders_every_n_epochs=1)),
    Row(
        "default_root_dir",
        tr(default_root_dir="here"),
        effect=lambda run: read_record(Path("here"))["step"] == 4,
    ),
    Row("enable_autolog_hparams", tr(enable_autolog_hparams="false")),
    # Lightning's cloud, which needs a package and an account; without it, it does nothing.
    Row("model_registry", tr(model_registry="name")),
]


@pytest.fixture
def short(hlbgpt: Callable[..., str], tiny: list[str]) -> Iterator[list[str]]:
    """Words of a run that is over in a blink and logs to a CSV file, and `mine.py`."""
    Path("mine.py").write_text(MINE)
    logger = tr(logger="CSVLogger") + tr(**{"logger.save_dir": "csv"})
    quick = ["--data.eval_batch_size=200", "--trainer.callbacks=null", *logger]
    yield [*QUICKSTART, "--run_name=quickstart", *tiny, *quick]
    torch.use_deterministic_algorithms(False)  # which a row switches on


def params(*, own_process: bool) -> list[Any]:
    rows = [row for row in CALLBACKS + TRAINER if row.own_process == own_process]
    return [pytest.param(row, id=" ".join(row.words)) for row in rows]


@pytest.mark.slow  # CI runs it
@pytest.mark.parametrize("row", params(own_process=False))
def test_it_works_or_is_refused_in_one_line(hlbgpt, short: list[str], capfd, row: Row) -> None:
    if row.needs and importlib.util.find_spec(row.needs):
        pytest.skip(f"{row.needs} is installed")
    if row.refused:
        assert row.refused in error_of(hlbgpt, capfd, "fit", *short, *row.words)
        return
    assert row.effect(Ran(hlbgpt("fit", *short, *row.words), hlbgpt))


@pytest.mark.slow
@pytest.mark.parametrize("row", params(own_process=True))
def test_it_works_in_a_process_of_its_own(hlbgpt, short: list[str], row: Row) -> None:
    words = [sys.executable, "-m", "hlbgpt", "fit", *short, *row.words]
    # Not the port that DDP in a test before this one may still hold.
    env = {key: value for key, value in os.environ.items() if key != "MASTER_PORT"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    assert row.effect(Ran(done.stdout, hlbgpt))


def test_no_callback_and_no_setting_is_missing() -> None:
    assert {row.name for row in CALLBACKS} == set(callbacks.__all__)
    parameters = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    assert {row.name for row in TRAINER} == parameters


# --- what a row is too short for ------------------------------------------------------------------


def test_a_run_that_fails_leaves_a_checkpoint_of_where_it_failed(hlbgpt, short) -> None:
    crash = cb("OnExceptionCheckpoint", dirpath="crash")
    with pytest.raises(RuntimeError, match="mine"):  # the traceback of a user's own callback
        hlbgpt("fit", *short, *crash, *cb("mine.Fails"))
    assert torch.load("crash/on_exception.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_losses_are_added_up_exactly_whatever_the_weights_are(hlbgpt, short, precision) -> None:
    hlbgpt("fit", *short, f"--trainer.precision={precision}")
    value = read_record(RUN)["value"]
    net = PretrainedModel.from_checkpoint(LAST).net.to(
        {"bf16-true": torch.bfloat16, "16-true": torch.float16}[precision]
    )
    (folder,) = [word.split("=")[1] for word in short if "source.folder" in word]
    text = torch.tensor(list((Path(folder) / "wiki.valid.raw").read_bytes()))
    length = (len(text) - 1) // 32 * 32
    windows = text[:-1][:length].view(-1, 32), text[1:][:length].view(-1, 32)
    batch = torch.cat([windows[0], windows[1][:, -1:]], dim=1)
    last = text[length:]
    with torch.no_grad():
        losses = [
            token_scores(net, part[None] if part.ndim == 1 else part).loss.double()
            for part in (batch, last)
            if part.shape[-1] > 1
        ]
    exact = sum(loss.sum() for loss in losses) / sum(loss.numel() for loss in losses)
    assert value == pytest.approx(exact.item(), rel=1e-5)


def test_averaged_weights_resume_exactly(hlbgpt, short) -> None:
    """A finished run goes on from the weights that it trained, not from their average."""
    words = ["fit", *short, *cb("EMAWeightAveraging", decay=0.5)]
    hlbgpt(*words, "--trainer.max_steps=6")
    hlbgpt(*words)
    hlbgpt(
        "fit",
        f"--ckpt_path={RUN.with_name('version_1')}/checkpoints/last.ckpt",
        "--trainer.max_steps=6",
    )
    whole, parts = (
        torch.load(RUN.with_name(name) / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("version_0", "version_2")
    )
    for key in ("state_dict", "current_model_state"):
        for name, value in whole[key].items():
            assert torch.equal(value, parts[key][name])
    assert not torch.equal(
        whole["state_dict"]["net.embedding.weight"],
        whole["current_model_state"]["net.embedding.weight"],
    )


def test_averaged_weights_are_measured_when_compiled(hlbgpt, short, quick_compile) -> None:
    words = [*short, *cb("EMAWeightAveraging", decay=0.5)]
    hlbgpt("fit", *words)
    hlbgpt("fit", *words, "--model.compile=true")
    plain, compiled = (read_record(RUN.with_name(f"version_{n}"))["value"] for n in (0, 1))
    assert compiled == pytest.approx(plain, rel=1e-5)


def test_a_setting_that_no_config_can_hold_is_named(hlbgpt, short, capfd) -> None:
    message = error_of(hlbgpt, capfd, "fit", *short, *cb("mine.OnDevice"))
    assert "config.yaml: a setting of the run, 'cpu', cannot be written to it" in message


# --- from Python ----------------------------------------------------------------------------------


def test_a_trainer_of_lightnings_with_callbacks_of_ours(folder: Path, tmp_path: Path) -> None:
    """Record and checkpoint are in `default_root_dir`; FLOPs are those of the record."""
    module, data = make(folder, tmp_path / "cache", optimizer=sgd(0.5), micro_batches=3)
    throughput = ThroughputMonitor(
        batch_size_fn=lambda batch: batch.shape[:-1].numel(),
        length_fn=lambda batch: batch[..., 1:].numel(),
        window_size=3,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=8,
        max_epochs=-1,
        val_check_interval=4,
        log_every_n_steps=1,
        enable_progress_bar=False,
        default_root_dir=tmp_path / "run",
        logger=CSVLogger(tmp_path / "csv"),
        callbacks=[TimeToTarget(target=0.1), LastCheckpoint(), throughput],
    )
    trainer.fit(module, data)
    record = read_record(tmp_path / "run")
    assert (record["step"], record["tokens"]) == (8, 8 * 3 * 4 * 32)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 8
    with next((tmp_path / "csv").rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/device/flops_per_sec"]]
    assert len(rows) > 4
    for row in rows:
        per_token = float(row["train/device/flops_per_sec"]) / float(
            row["train/device/items_per_sec"]
        )
        assert per_token == pytest.approx(record["flops_per_token"])


def test_export(folder: Path, tmp_path: Path) -> None:
    module, _ = make(folder, tmp_path)
    tokens = torch.randint(256, (2, 8))
    program = torch.export.export(module.eval(), (tokens,))
    torch.testing.assert_close(program.module()(tokens), module(tokens))
    if importlib.util.find_spec("onnx"):
        module.to_onnx(tmp_path / "net.onnx", tokens)
    else:
        with pytest.raises(ModuleNotFoundError, match="requires `onnx` to be installed"):
            module.to_onnx(tmp_path / "net.onnx", tokens)
