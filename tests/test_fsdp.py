"""FSDP2: weights split over ranks, which are processes on the CPU here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hlbgpt.__main__ import main
from hlbgpt.runs.logger import scalars
from tests.conftest import CONFIGS, QUICKSTART, fitting
from tests.helpers import read_record, start_ranks, wait_for

SPEEDRUN = CONFIGS / "speedrun.yaml"
FSDP = CONFIGS / "machines" / "fsdp.yaml"
RUN = Path("version_0")
MUON = ["--model.optimizer=hlbgpt.optim.MuonAdamW"]

Fit = Callable[..., Path]


@pytest.fixture
def fit(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Train a small network with some ranks; returns the run's folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("HLBGPT_RUN_FOLDER", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)

    def run(name: str, strategy: str, ranks: int, *words: Any, config: Any = None) -> Path:
        base = ["--config", str(config)] if config else QUICKSTART
        words = (*base, *fitting(Path(base[1]), tiny), f"--run_name={name}", *words)
        words = ("fit", *map(str, words), f"--trainer.strategy={strategy}")
        log = tmp_path / f"{name}.log"
        ranks_ = start_ranks(main, list(words), number=ranks, launcher="torchrun", log=log)
        codes = wait_for(ranks_, timeout=100)
        printed = "".join(log.with_suffix(f".{rank}").read_text() for rank in range(ranks))
        assert codes == [0] * ranks, printed
        return tmp_path / "runs" / name / RUN

    return run


def curve(run: Path, name: str = "loss/train_loss") -> list[float]:
    return [point.value for point in scalars(run)[name]]


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_equal(ours: Path, theirs: Path) -> None:
    """Losses, norms, weights and optimizer states, which a checkpoint has as of one device."""
    for name in ("loss/train_loss", "loss/val_loss", "weight_gradient_norm/total"):
        assert curve(ours, name) == pytest.approx(curve(theirs, name), rel=1e-5), name
    one, other = checkpoint(ours), checkpoint(theirs)
    torch.testing.assert_close(one["state_dict"], other["state_dict"], rtol=1e-4, atol=1e-5)
    for state, expected in zip(one["optimizer_states"], other["optimizer_states"], strict=True):
        assert state["param_groups"] == expected["param_groups"]
        torch.testing.assert_close(state["state"], expected["state"], rtol=1e-3, atol=1e-6)


def test_training_equals_ddp(fit: Fit) -> None:
    split = fit("split", "fsdp2", 2)
    assert_equal(split, fit("whole", "ddp", 2))
    assert read_record(split)["devices"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "words",
    [
        [*MUON, "--data.micro_batches=2", "--data.micro_batch_size=6", "--trainer.gradient_clip_val=0.5"],
        [
            "--data.micro_batch_size=6",
            "--trainer.callbacks+=GradientHistograms",
            "--trainer.callbacks.every_n_steps=2",
        ],
    ],
    ids=["muon", "adamw"],
)
def test_quickstart_equals_ddp(fit: Fit, words: list[str], ranks: int) -> None:
    assert_equal(fit("split", "fsdp2", ranks, *words), fit("whole", "ddp", ranks, *words))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_speedrun_equals_ddp(fit: Fit, precision: str) -> None:
    """With token counts, a pointer, clusters, value embeddings, and Muon."""
    words = [f"--trainer.precision={precision}", "--model.net.init_args.value_embed_blocks=1"]
    split = fit("split", "fsdp2", 2, "--config", FSDP, *words, config=SPEEDRUN)
    assert_equal(split, fit("whole", "ddp", 2, *words, config=SPEEDRUN))
