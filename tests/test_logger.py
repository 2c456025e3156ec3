"""TensorBoard: metrics in groups, losses by tokens, norms, settings, samples."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import QUICKSTART, RUN
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import nn

from hlbgpt.optim import MuonAdamW, parameter_groups
from hlbgpt.runs.config import hparams
from hlbgpt.runs.logger import BY_TOKENS, RunLogger
from hlbgpt.training.step_metrics import StepMetrics


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
    by_tokens = EventAccumulator(str(RUN / BY_TOKENS)).Reload()
    assert set(by_tokens.Tags()["scalars"]) == {
        "loss_by_tokens/train_loss",
        "loss_by_tokens/val_loss",
    }
    step_tokens = 3 * 4 * 32
    assert {p.value for p in events.Scalars("schedule/step_tokens")} == {step_tokens}
    for name, every in {"train_loss": 1, "val_loss": 2}.items():
        points = by_tokens.Scalars(f"loss_by_tokens/{name}")
        assert [p.value for p in points] == [p.value for p in events.Scalars(f"loss/{name}")]
        steps = range(every, 5, every)
        assert [p.step for p in points] == [step * step_tokens for step in steps]
        seconds = [p.wall_time for p in points]
        assert seconds == sorted(seconds)
        assert 0 < seconds[0] < seconds[-1] <= record["train_seconds"]
    assert seconds[-1] == pytest.approx(record["train_seconds"], rel=0.2)


def test_settings_are_logged_as_text_and_hparams(events: EventAccumulator) -> None:
    text = (RUN / "config.yaml").read_text()
    (shown,) = events.Tensors("config/text_summary")
    assert shown.tensor_proto.string_val[0].decode() == f"```yaml\n{text}\n```"
    data = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(data).session_start_info
    kept = {name: value.WhichOneof("kind") for name, value in start.hparams.items()}
    assert kept["model.optimizer.lr"] == "number_value"
    assert start.hparams["model.net"].string_value == "hlbgpt.models.GPT"
    assert start.hparams["data.micro_batches"].number_value == 3
    assert not any(name.startswith(("trainer.logger", "config")) for name in kept)
    assert "time_to_target/train_seconds" in events.Tags()["scalars"]


def test_hparams_are_the_settings_that_distinguish_runs() -> None:
    settings = {
        "seed_everything": 3,
        "config": None,
        "trainer": {"precision": "32-true", "logger": {"class_path": "X"}, "max_steps": 5},
        "model": {"net": {"class_path": "a.B", "init_args": {"width": 8, "cutoffs": [1, 2]}}},
        "data": {"seed": None, "prompts": ["a"], "cache_dir": "b"},
    }
    assert hparams(yaml.safe_dump(settings)) == {
        "seed_everything": 3,
        "trainer.precision": "32-true",
        "trainer.max_steps": 5,
        "model.net": "a.B",
        "model.net.width": 8,
        "model.net.cutoffs": "[1, 2]",
    }


def test_norms_by_group_are_those_of_gradient_and_update() -> None:
    net = nn.ModuleDict(
        {"blocks": nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 6)]), "out": nn.Embedding(5, 3)}
    )
    groups = {"block_matrices": {"method": "muon", "lr": 0.1}}
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
    """As by a run that resumes from an earlier checkpoint."""
    first, second = RunLogger(), RunLogger()
    first.open_in(tmp_path)
    for step in range(1, 6):
        place = {"tokens_seen": 100.0 * step, "train_seconds": float(step)}
        first.log_metrics({"train_loss": 5.0, **place}, step)
    first.finalize("failed")
    second.open_in(tmp_path)
    second.log_metrics({"train_loss": 4.0, "tokens_seen": 400.0, "train_seconds": 9.0}, 4)
    second.finalize("success")
    folder = tmp_path / BY_TOKENS
    for number, file in enumerate(sorted(folder.glob("*"), key=lambda f: f.stat().st_mtime)):
        file.rename(folder / f"events.out.tfevents.{number}")
    points = EventAccumulator(str(folder)).Reload().Scalars("loss_by_tokens/train_loss")
    assert [(p.step, p.value, p.wall_time) for p in points] == [
        (100, 5.0, 1.0),
        (200, 5.0, 2.0),
        (300, 5.0, 3.0),
        (400, 4.0, 9.0),
    ]


def test_other_metrics_keep_their_names(tmp_path: Path) -> None:
    logger = RunLogger()
    logger.open_in(tmp_path)
    logger.log_metrics({"mine": 1.0, "a/b": torch.tensor(2.0), "val_loss": 3.0}, 0)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"mine", "a/b", "loss/val_loss"}
    assert not (tmp_path / BY_TOKENS).exists()


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
            assert len(prompt) + 8 < len(written) <= len(prompt) + 1 + 32
    assert out.count("\nReturn the ") == out.count("\nIf the ") == 1
