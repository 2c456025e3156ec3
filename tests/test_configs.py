"""Every shipped config is parsed, instantiated and run for a few steps."""

import math
from pathlib import Path

import pytest
import yaml
from conftest import CONFIGS, fitting
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hlbgpt.cli.main import build
from hlbgpt.optim import MuonAdamW, parameter_groups

SIZES = {"width", "num_heads", "num_blocks", "capacity", "loss_chunk_tokens", "fused_mlp"}
NGRAMS = {"ngram_order", "ngram_rows"}


@pytest.mark.parametrize(
    ("name", "other"), [("midsize", SIZES), ("short", SIZES), ("open", NGRAMS)]
)
def test_network_and_optimizer_are_the_speedruns(name: str, other: set[str]) -> None:
    ours, theirs = (
        yaml.safe_load((CONFIGS / f"{each}.yaml").read_text())["model"]
        for each in (name, "speedrun")
    )
    assert ours["optimizer"] == theirs["optimizer"]
    ours, theirs = (model["net"]["init_args"].items() for model in (ours, theirs))
    assert {k: v for k, v in ours if k not in other} == {k: v for k, v in theirs if k not in other}


def test_one_rate_can_be_changed() -> None:
    words = ["--config", str(CONFIGS / "speedrun.yaml")]
    whole, changed = (
        dict(build([*words, *more], device="meta").config.model.optimizer.init_args)
        for more in ([], ["--model.optimizer.groups.block_matrices.lr=0.5"])
    )
    groups = parameter_groups(build(words, device="meta").net)
    before, after = (MuonAdamW(groups, **each).param_groups for each in (whole, changed))
    assert before[0].pop("lr") == 0.02
    assert after[0].pop("lr") == 0.5
    assert before == after


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_runs(config: Path, hlbgpt, tiny: list[str]) -> None:
    out = hlbgpt("fit", "--config", config, *fitting(config, tiny))
    assert "target NOT met" in out
    folder = Path("runs") / config.stem / "version_0"
    assert {path.name for path in folder.iterdir()} >= {"config.yaml", "record.json", "checkpoints"}
    events = EventAccumulator(str(folder)).Reload()
    logged = set(events.Tags()["scalars"])
    assert logged >= {
        "loss/train_loss",
        "loss/val_loss",
        "quality/val_perplexity",
        "quality/val_bits_per_byte",
        "quality/val_accuracy",
        "lr/block_matrices",
        "weight_update_norm/block_matrices",
        "weight_gradient_norm/block_matrices",
        "schedule/step_tokens",
        "weight_gradient_norm/total",
        "progress/tokens_seen",
        "speed/tokens_per_second",
        "schedule/micro_batches_per_step",
        "loss-and-time/train_seconds",
        "loss-and-time/reached",
    }
    losses = events.Scalars("loss/val_loss")
    assert all(math.isfinite(point.value) for point in losses)
    assert losses[-1].value < losses[0].value < math.log(256) + 0.5
    assert len(events.Scalars("loss-and-time/train_seconds")) == 1
    steps = [point.step for point in events.Scalars("loss/train_loss")]
    assert steps == sorted(set(steps))
