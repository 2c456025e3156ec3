"""TensorBoard: metrics in groups, losses by tokens, norms, settings, samples."""

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import QUICKSTART, RUN
from helpers import open_logger
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.plugins.hparams.backend_context import Context
from torch import nn

from hlbgpt.optim import MuonAdamW, parameter_groups
from hlbgpt.runs import RunLogger
from hlbgpt.runs.config import hparams
from hlbgpt.runs.logger import HEADLINE, scalars, tag
from hlbgpt.training.step_metrics import StepMetrics
from hlbgpt.utils.errors import InputError


@pytest.fixture
def events(hlbgpt: Callable[..., str], tiny: list[str]) -> EventAccumulator:
    """The events of a run of four steps with validations after two and four."""
    hlbgpt("fit", *QUICKSTART, *tiny, "--data.micro_batches=3")
    return EventAccumulator(str(RUN)).Reload()


def test_every_name_is_in_a_group(events: EventAccumulator) -> None:
    assert all("/" in tag for tag in events.Tags()["scalars"])


def test_losses_are_logged_by_tokens_and_training_time(
    events: EventAccumulator,
) -> None:
    record = json.loads((RUN / "record.json").read_text())
    step_tokens = 3 * 4 * 32
    assert {p.value for p in events.Scalars("schedule/step_tokens")} == {step_tokens}
    for name, every in {"train_loss": 1, "val_loss": 2}.items():
        steps = list(range(every, 5, every))
        by_step = events.Scalars(f"loss/{name}")
        points = events.Scalars(f"loss/{name}_by_tokens")
        assert [p.value for p in points] == [p.value for p in by_step]
        assert [p.step for p in by_step] == steps  # counted from 1, as on the console
        assert [p.step for p in points] == [step * step_tokens for step in steps]
        seconds = [p.wall_time for p in points]
        assert seconds == sorted(seconds)
        assert 0 < seconds[0] < seconds[-1] <= record["train_seconds"]
    assert seconds[-1] == pytest.approx(record["train_seconds"], rel=0.2)
    assert list(RUN.glob("**/events*")) == list(RUN.glob("events*"))  # one run in TensorBoard


def test_losses_come_first_and_norms_last(events: EventAccumulator) -> None:
    """TensorBoard sorts groups by name."""
    groups = sorted({name.split("/")[0] for name in events.Tags()["scalars"]})
    assert "loss" in groups
    assert next(group for group in groups if "loss" not in group) > "loss"
    assert groups[-2:] == ["weight_gradient_norm", "weight_update_norm"]


def test_one_chart_has_train_and_validation_loss(events: EventAccumulator) -> None:
    (shown,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(shown.tensor_proto.string_val[0])
    names = events.Tags()["scalars"]
    charts = {
        chart.title: [name for name in names if any(re.match(t, name) for t in chart.multiline.tag)]
        for category in layout.category
        for chart in category.chart
    }
    assert all(charts.values())
    assert set(charts["train and validation loss by step"]) == {"loss/train_loss", "loss/val_loss"}
    assert set(charts["train and validation loss by tokens"]) == {
        "loss/train_loss_by_tokens",
        "loss/val_loss_by_tokens",
    }


def test_settings_are_logged_as_text_and_hparams(events: EventAccumulator) -> None:
    text = (RUN / "config.yaml").read_text()
    (shown,) = events.Tensors("settings/text_summary")
    assert shown.tensor_proto.string_val[0].decode() == f"```yaml\n{text}\n```"
    data = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(data).session_start_info
    kept = {name: value.WhichOneof("kind") for name, value in start.hparams.items()}
    assert kept["model.optimizer.lr"] == "number_value"
    assert start.hparams["model.net"].string_value == "hlbgpt.models.GPT"
    assert start.hparams["data.micro_batches"].number_value == 3
    assert start.hparams["precision"].string_value == "32-true"
    assert not any(name.startswith(("trainer.logger", "config")) for name in kept)


def test_hparams_show_the_settings_that_differ_and_the_result_first(
    hlbgpt: Callable[..., str], tiny: list[str]
) -> None:
    """As TensorBoard's own server answers; its page shows the first five of each."""
    for seed, width in ((0, 16), (1, 16), (1, 32)):
        net = f"--model.net.init_args.width={width}"
        hlbgpt("fit", *QUICKSTART, *tiny, f"--seed_everything={seed}", net)
    runs = EventMultiplexer().AddRunsFromDirectory("runs").Reload()
    context = base_plugin.TBContext(data_provider=MultiplexerDataProvider(runs, "runs"))
    compare, request = Context(context), RequestContext()
    found = compare.experiment_from_metadata(
        request, "", True, compare.hparams_metadata(request, ""), []
    )
    differs = [info.differs for info in found.hparam_infos]
    assert [info.name for info in found.hparam_infos][:2] == ["model.net.width", "seed"]
    assert differs[:2] == [True, True]
    assert not any(differs[2:])
    assert [info.name.tag for info in found.metric_infos][:5] == [
        f"{HEADLINE}/{name}"
        for name in ("reached", "tokens", "train_seconds", "value", "wall_seconds")
    ]


def test_hparams_are_the_settings_that_distinguish_runs() -> None:
    settings = {
        "seed_everything": 3,
        "config": None,
        "trainer": {"precision": "32-true", "logger": {"class_path": "X"}, "max_steps": 5},
        "model": {"net": {"class_path": "a.B", "init_args": {"width": 8, "cutoffs": [1, 2]}}},
        "data": {"seed": None, "prompts": ["a"], "cache_dir": "b"},
    }
    assert hparams(yaml.safe_dump(settings)) == {
        "trainer.max_steps": 5,
        "model.net": "a.B",
        "model.net.width": 8,
        "model.net.cutoffs": "[1, 2]",
    }


def test_norms_by_group_are_those_of_gradient_and_update() -> None:
    net = nn.ModuleDict(
        {"blocks": nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 6)]), "out": nn.Embedding(5, 3)}
    )
    groups = {"block_matrices": {"lr": 0.1}}
    optimizer = MuonAdamW(parameter_groups(net), groups, lr=0.01)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    metrics = StepMetrics(norms=True)
    values = metrics.before_step(optimizer)
    optimizer.step()
    values |= metrics.after_step(optimizer)
    after = dict(net.named_parameters())
    groups_of = {
        "block_matrices": ["blocks.0.weight", "blocks.1.weight"],
        "embeddings": ["out.weight"],
        "vectors": ["blocks.0.bias", "blocks.1.bias"],
    }
    for group, names in groups_of.items():
        grads = torch.cat([after[name].grad.flatten() for name in names])
        moves = torch.cat([(after[name] - before[name]).flatten() for name in names])
        torch.testing.assert_close(values[f"grad_norm/{group}"], grads.norm())
        torch.testing.assert_close(values[f"update_norm/{group}"], moves.norm())
    assert values["lr/block_matrices"] == 0.1
    assert values["momentum/block_matrices"] == 0.95
    assert metrics.after_step(optimizer) == {}  # a step that is not logged
    assert set(StepMetrics(norms=False).before_step(optimizer)) == {
        *(f"lr/{group}" for group in groups_of),
        "momentum/block_matrices",
    }


def test_losses_by_tokens_hide_what_is_made_again(tmp_path: Path) -> None:
    """As by a run that resumes twice, each time from a checkpoint before its last step."""
    parts = ((0, range(6), 5.0), (3, range(3, 7), 4.0), (5, range(5, 8), 3.0))
    for made, steps, loss in parts:
        logger = open_logger(tmp_path, step=made, tokens=100 * made)
        for step in steps:  # counted from 0, as by Lightning
            seconds = 10 * loss + step
            place = {"tokens_seen": 100.0 * (step + 1), "train_seconds": seconds}
            logger.log_metrics({"train_loss": loss, **place}, step)
        logger.finalize("failed")
    losses = [5.0] * 3 + [4.0] * 2 + [3.0] * 3
    for points, unit in (("train_loss", 1), ("train_loss_by_tokens", 100)):
        found = scalars(tmp_path)[f"loss/{points}"]
        assert [(p.step, p.value) for p in found] == [
            (unit * number, loss) for number, loss in enumerate(losses, start=1)
        ]
    assert [p.wall_time for p in found] == [10 * loss + step for step, loss in enumerate(losses)]


def test_a_kill_while_a_run_resumes_loses_no_losses_by_tokens(tmp_path: Path) -> None:
    """Whatever part of its events was written when it was killed."""
    logger = open_logger(tmp_path)
    for step in range(12):
        logger.log_metrics({"val_loss": float(step), "tokens_seen": 100.0 * (step + 1)}, step)
    logger.finalize("failed")
    logger = open_logger(tmp_path, step=10, tokens=1000)
    before = set(tmp_path.iterdir())
    logger.experiment.close()
    *_, last = sorted(tmp_path.glob("events*"))
    written = {path: path.read_bytes() for path in set(tmp_path.iterdir()) - before}
    whole = written[last]
    cuts = [*range(0, len(whole), 37), len(whole)]
    for kept in [{}, *({**written, last: whole[:cut]} for cut in cuts)]:
        for path in written:
            path.unlink(missing_ok=True)
        for path, content in kept.items():
            path.write_bytes(content)
        found = scalars(tmp_path)["loss/val_loss_by_tokens"]
        assert [(p.step, p.value) for p in found][:10] == [
            (100 * (step + 1), float(step)) for step in range(10)
        ]
        assert len(found) in (10, 12)  # the steps that will be made again are hidden, or not yet


def test_a_new_run_hides_what_an_earlier_one_left(tmp_path: Path) -> None:
    """One that was killed before its first checkpoint."""
    for loss in (5.0, 4.0):
        logger = open_logger(tmp_path)
        logger.experiment.add_scalar("mine", loss, 0)
        logger.log_metrics({"train_loss": loss, "tokens_seen": 100.0}, 0)
        logger.finalize("failed")
    found = {name: [point.value for point in points] for name, points in scalars(tmp_path).items()}
    names = ("mine", "loss/train_loss", "loss/train_loss_by_tokens", "progress/tokens_seen")
    assert found == {name: [4.0] for name in names[:3]} | {names[3]: [100.0]}


def test_other_metrics_keep_their_names(tmp_path: Path) -> None:
    logger = open_logger(tmp_path)
    logger.log_metrics({"mine": 1.0, "a/b": torch.tensor(2.0), "val_loss": 3.0}, 0)
    logger.finalize("success")
    assert set(scalars(tmp_path)) == {"mine", "a/b", "loss/val_loss"}


def test_settings_of_a_module_of_ones_own_are_kept(tmp_path: Path) -> None:
    """Lightning logs what `save_hyperparameters` found before a run's settings are logged."""
    logger = open_logger(tmp_path)
    logger.log_hyperparams({"mine": [1, 2], "none": None})
    logger.log_hyperparams({"lr": 0.5})
    logger.log_metrics({"train_loss": 1.0}, 0)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload()
    data = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(data).session_start_info
    assert set(start.hparams) == {"mine", "none", "lr"}
    assert start.hparams["mine"].string_value == "[1, 2]"


def test_a_logger_without_a_folder_says_so() -> None:
    with pytest.raises(InputError, match=r"RunLogger: no folder to log into; call `open_in"):
        RunLogger().log_metrics({"train_loss": 1.0}, 0)


NOTES = """
from lightning.pytorch.loggers import CSVLogger, Logger

class Notes(Logger):
    name, version, calls = "notes", 0, []

    def log_hyperparams(self, params, *args, **kwargs):
        self.calls.append(("settings", params))

    def log_metrics(self, metrics, step=None):
        self.calls.append((step, metrics))

class Refuses(CSVLogger):
    def log_hyperparams(self, params, *args, **kwargs):
        raise TypeError("cannot log " + str(params["model.net"]))
"""


def test_settings_and_record_go_to_every_logger(
    hlbgpt: Callable[..., str], tiny: list[str]
) -> None:
    Path("mine.py").write_text(NOTES)
    tables = ["mine.Refuses", "lightning.pytorch.loggers.CSVLogger"]
    loggers: list[Any] = [{"class_path": name} for name in ("mine.Notes", "hlbgpt.runs.RunLogger")]
    loggers += [{"class_path": name, "init_args": {"save_dir": name}} for name in tables]
    Path("loggers.yaml").write_text(yaml.safe_dump({"trainer": {"logger": loggers}}))
    out = hlbgpt("fit", *QUICKSTART, "--config", "loggers.yaml", *tiny)
    assert "Refuses did not log the settings: cannot log hlbgpt.models.GPT\n" in out
    (folder,) = Path("runs/loggers").iterdir()
    record = json.loads((folder / "record.json").read_text())
    figures = {
        f"time_to_target/{name}": value
        for name, value in record.items()
        if isinstance(value, (bool, int, float)) and name not in ("target", "seed", "devices")
    }
    del figures["time_to_target/checkpoint_seconds"]  # goes on after the figures were logged

    (first, settings), *logged = sys.modules["mine"].Notes.calls
    assert (first, settings["model.net.width"], settings["seed"]) == ("settings", 16, 0)
    assert None not in settings.values()
    step, last = logged[-1]
    assert step == 3  # Lightning counts steps from 0
    assert figures.items() <= last.items()
    assert all(type(value) is float for value in last.values())
    assert [step for step, found in logged if "val_loss" in found] == [1, 3]

    shown = scalars(folder)
    for name, value in figures.items():
        (point,) = shown[tag(name)]
        assert (point.step, point.value) == (4, pytest.approx(float(value)))
    for name in tables:
        (table,) = Path(name).rglob("metrics.csv")
        rows = list(csv.DictReader(table.open()))
        assert float(rows[-1]["time_to_target/value"]) == pytest.approx(record["value"])
        assert [row["step"] for row in rows if row["val_loss"]] == ["1", "3"]
    (saved,) = Path(tables[-1]).rglob("hparams.yaml")
    assert yaml.safe_load(saved.read_text())["model.net.width"] == 16


def test_samples_come_after_each_validation_and_at_the_end(
    hlbgpt: Callable[..., str], tiny: list[str]
) -> None:
    out = hlbgpt("fit", *QUICKSTART, *tiny)
    events = EventAccumulator(str(RUN)).Reload()
    validations = [point.step for point in events.Scalars("loss/val_loss")]
    for prompt in ("Return the", "If the"):
        shown = events.Tensors(f"samples/{prompt}/text_summary")
        assert [point.step for point in shown] == validations
        for point in shown:
            text = point.tensor_proto.string_val[0].decode()
            written = "".join(line.removeprefix("    ") for line in text.split("\n"))
            assert written.startswith(prompt)
            assert len(prompt) + 100 < len(written) <= len(prompt) + 1 + 200
    assert out.count("\nReturn the ") == out.count("\nIf the ") == 1
