"""FSDP2: weights split over ranks, which are processes on the CPU here."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CONFIGS, QUICKSTART, fitting
from helpers import error, in_ranks, read_record, start_ranks, wait_for
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from hlbgpt.__main__ import main
from hlbgpt.models import GPT, Network
from hlbgpt.runs.logger import scalars
from hlbgpt.training import fsdp
from hlbgpt.utils.errors import InputError

SPEEDRUN = CONFIGS / "speedrun.yaml"
FSDP = CONFIGS / "machines" / "fsdp.yaml"
MUON = ["--model.optimizer=hlbgpt.optim.MuonAdamW"]

Fit = Callable[..., Path]


def in_processes(log: Path, ranks: int, *words: Any) -> str:
    """Run a command line on some ranks; returns what rank 0 printed."""
    texts = [str(word) for word in words]
    started = start_ranks(main, texts, number=ranks, launcher="torchrun", log=log)
    codes = wait_for(started, timeout=100)
    printed = [log.with_suffix(f".{rank}").read_text() for rank in range(ranks)]
    assert codes == [0] * ranks, "".join(printed)
    return printed[0]


@pytest.fixture
def fit(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Train a small network with some ranks; returns the run's folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("HLBGPT_RUN_FOLDER", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)

    def run(name: str, strategy: str, ranks: int, *words: Any, config: Any = None) -> Path:
        base = ["--config", str(config)] if config else QUICKSTART
        words = (*base, *fitting(Path(base[1]), tiny), f"--run_name={name}", *words)
        if strategy:
            words = (*words, f"--trainer.strategy={strategy}")
        in_processes(tmp_path / f"{name}.log", ranks, "fit", *words)
        return tmp_path / "runs" / name / "version_0"

    return run


def curve(run: Path, name: str = "loss/train_loss") -> list[float]:
    return [point.value for point in scalars(run)[name]]


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_equal(ours: Path, theirs: Path, rel: float = 1e-5, near: float = 1e-3) -> None:
    """Losses, norms, weights and optimizer states, which a checkpoint has as of one device."""
    for name in ("loss/train_loss", "loss/val_loss", "weight_gradient_norm/total"):
        assert curve(ours, name) == pytest.approx(curve(theirs, name), rel=rel), name
    one, other = checkpoint(ours), checkpoint(theirs)
    assert_near(one["state_dict"], other["state_dict"], near)
    for state, expected in zip(one["optimizer_states"], other["optimizer_states"], strict=True):
        assert state["param_groups"] == expected["param_groups"]
        assert state["state"].keys() == expected["state"].keys()
        for number, values in expected["state"].items():
            assert_near(state["state"][number], values, near)


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], rel: float) -> None:
    """Tensors of the same names, shapes and dtypes, with differences of small norm."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (value.shape, value.dtype)
        assert error(ours[name], value, least=1e-6) < rel, name


def test_training_equals_ddp(fit: Fit) -> None:
    split = fit("split", "fsdp2", 2)
    assert_equal(split, fit("whole", "ddp", 2))
    assert read_record(split)["devices"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "words",
    [
        [
            *MUON,
            "--data.micro_batches=2",
            "--data.micro_batch_size=6",
            "--trainer.gradient_clip_val=0.5",
        ],
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
@pytest.mark.parametrize(
    ("precision", "rel", "near"), [("32-true", 1e-5, 1e-3), ("bf16-mixed", 1e-4, 0.05)]
)
def test_speedrun_equals_ddp(fit: Fit, precision: str, rel: float, near: float) -> None:
    """With token counts, a pointer, clusters, value embeddings, and Muon."""
    words = [f"--trainer.precision={precision}", "--model.net.init_args.value_embed_blocks=1"]
    split = fit("split", "", 2, "--config", FSDP, *words, config=SPEEDRUN)
    assert_equal(split, fit("whole", "ddp", 2, *words, config=SPEEDRUN), rel, near)


@pytest.mark.slow
def test_compiled_with_activation_checkpointing(fit: Fit, quick_compile: None) -> None:
    words = ["--model.compile=true", *MUON]
    split = fit("split", "fsdp2", 2, *words, "--model.activation_checkpointing=true")
    assert_equal(split, fit("whole", "ddp", 2, *words))


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [[], MUON], ids=["adamw", "muon"])
def test_runs_go_on_with_any_strategy_and_number_of_ranks(fit: Fit, optimizer: list[str]) -> None:
    """As those do that DDP has begun: from the same state, on the same data."""
    words = [*optimizer, "--data.micro_batch_size=6"]
    begun = [*words, "--trainer.max_steps=2"]
    split, whole = fit("split", "fsdp2", 2, *begun), fit("whole", "ddp", 2, *begun)

    def resumed(run: Path, strategy: str, ranks: int) -> Path:
        name = f"{run.parent.name}-{strategy}-{ranks}"
        last = run / "checkpoints" / "last.ckpt"
        return fit(name, strategy, ranks, *words, f"--ckpt_path={last}")

    expected = resumed(whole, "ddp", 2)
    assert len(curve(expected)) == 2
    for start, strategy in ((split, "fsdp2"), (split, "ddp"), (whole, "fsdp2")):
        assert_equal(resumed(start, strategy, 2), expected)
    assert_equal(resumed(split, "fsdp2", 3), resumed(whole, "ddp", 3))
    assert_equal(resumed(split, "auto", 1), resumed(whole, "auto", 1))


@pytest.mark.slow
def test_resume_is_exact(fit: Fit) -> None:
    """To the last bit, with the same number of ranks."""
    full = fit("full", "fsdp2", 2, *MUON)
    begun = fit("begun", "fsdp2", 2, *MUON, "--trainer.max_steps=2")
    last = begun / "checkpoints" / "last.ckpt"
    resumed = fit("resumed", "fsdp2", 2, *MUON, f"--ckpt_path={last}")
    one, other = checkpoint(full), checkpoint(resumed)
    torch.testing.assert_close(one["state_dict"], other["state_dict"], rtol=0, atol=0)
    states = (found["optimizer_states"][0]["state"] for found in (one, other))
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert curve(full)[2:] == curve(resumed)


@pytest.mark.slow
def test_checkpoint_is_measured_and_continued(
    fit: Fit, hlbgpt: Callable[..., str], tmp_path: Path
) -> None:
    """On one device with its run's strategy or without, and measured on two as well."""
    run = fit("split", "fsdp2", 2)
    words = ["--ckpt_path", run / "checkpoints" / "last.ckpt"]
    prompt, auto = "--data.prompts=The ", ["--trainer.strategy=auto", "--trainer.devices=1"]
    text = hlbgpt("predict", *words, *auto, prompt)
    assert text.startswith("The ")
    assert text in in_processes(tmp_path / "predict.log", 1, "predict", *words, prompt)
    measured = f"{curve(run, 'loss/val_loss')[-1]:.4f}"[:-1]
    assert measured in hlbgpt("validate", *words, *auto)
    for ranks in (1, 2):
        log = tmp_path / f"validate-{ranks}.log"
        assert measured in in_processes(log, ranks, "validate", *words)


@pytest.mark.slow
def test_changes_of_whole_weights_are_kept() -> None:
    """As a network makes them that initializes weights from token counts."""

    def change(rank: int) -> dict[str, torch.Tensor]:
        net = small()
        empty = fsdp.split(net, init_device_mesh("cpu", (2,)))
        with fsdp.gathered(net, empty, keep_changes=True), torch.no_grad():
            for number, parameter in enumerate(net.parameters()):
                parameter.fill_(number)
        with fsdp.gathered(net, empty), torch.no_grad():
            net.norm.weight.fill_(-1.0)
        return {name: fsdp.whole(parameter) for name, parameter in net.named_parameters()}

    for weights in in_ranks(2, change):
        for number, value in enumerate(weights.values()):
            assert (value == number).all()


# --- what cannot be split -------------------------------------------------------------------------


def small() -> GPT:
    return GPT(vocab_size=16, max_sequence_length=8, width=8, num_heads=2, num_blocks=2)


def with_scalar(net: Network) -> None:
    net.register_parameter("gain", nn.Parameter(torch.ones(())))


def with_shared_block(net: Network) -> None:
    net.blocks[1].mlp = net.blocks[0].mlp  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [(with_scalar, "gain has no dimensions"), (with_shared_block, "are one parameter")],
)
def test_network_that_cannot_be_split(change: Callable[[Network], None], message: str) -> None:
    change(net := small())
    with pytest.raises(InputError, match=message):
        fsdp.split(net, None)  # type: ignore[arg-type]


def test_gradient_scaler_is_refused() -> None:
    strategy = fsdp.FSDP2Strategy()
    trainer = SimpleNamespace(strategy=strategy, precision="16-mixed", callbacks=[])
    with pytest.raises(InputError, match="16-mixed"):
        fsdp.require_fitting_fsdp2(trainer)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--trainer.strategy=fsdp2", "--trainer.callbacks+=EMAWeightAveraging"],
            "EMAWeightAveraging: it averages whole",
        ),
        (
            ["--trainer.strategy={class_path: ModelParallelStrategy}"],
            "trainer.strategy: ModelParallelStrategy is not supported",
        ),
        (
            ["--trainer.strategy=mine.Strategy"],
            "for a class write --trainer.strategy '{class_path: mine.Strategy}'",
        ),
    ],
)
def test_refused(
    hlbgpt: Callable[..., str],
    tiny: list[str],
    words: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        hlbgpt("fit", *QUICKSTART, *tiny, *words)
    assert message in capfd.readouterr().err
