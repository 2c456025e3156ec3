"""Plans: shapes, memory and time of runs that are never made."""

import json
import re
import sys
from pathlib import Path

import plan as script
import pytest
import torch
from conftest import CONFIGS

from hlbgpt.models import GPT, HLB041, FastGPT
from hlbgpt.optim import MuonAdamW, parameter_groups
from hlbgpt.planning.estimates import (
    Activations,
    Cost,
    Fixed,
    activation_bytes,
    fixed_costs,
    micro_batch_cost,
)
from hlbgpt.utils.hardware import CARDS, card_named

SIZES = {"vocab_size": 96, "max_sequence_length": 32, "width": 16, "num_blocks": 2}
TABLE = [
    {"tokens": 0, "sequence_length": 16, "step_tokens": 256, "lr": 1.0, "validate_every": 1024},
    {"tokens": 2048, "sequence_length": 32, "momentum": 0.9},
    {"tokens": 4096, "lr": 0.1, "momentum": 0.95},
]
SMALL = [
    *("--config", str(CONFIGS / "speedrun.yaml")),
    f"--schedule.table={json.dumps(TABLE)}",
    "--schedule.micro_batch_tokens=128",
    *("--model.net.init_args.width=32", "--model.net.init_args.num_heads=2"),
    "--model.net.init_args.num_blocks=1",
]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the script in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan.py", *words])
        script.main()
        return capsys.readouterr().out

    return run


def test_a_plan_of_a_schedule(plan, tmp_path: Path) -> None:
    out = plan(*SMALL, "--gpu", "a100")
    assert "4,096 tokens in 16 steps, 4 validations" in out
    shapes = [line.split() for line in out.splitlines() if " x " in line][1:]
    assert [row[:6] for row in shapes] == [
        ["16", "x", "8", "2", "8", "0.00M"],
        ["32", "x", "4", "2", "8", "0.00M"],
    ]
    assert {row[-1] for row in shapes} <= {"products", "memory"}
    assert "an estimate, ±25% at best" in out
    assert out.splitlines()[-1].startswith("A100 ")
    assert not list(tmp_path.iterdir())


def test_without_a_schedule_the_settings_of_the_data_hold(plan) -> None:
    out = plan("--config", str(CONFIGS / "hlb041.yaml"), "--trainer.max_steps=10")
    assert f"{10 * 56 * 1024:,} tokens in 10 steps" in out
    assert "callbacks may change that: SequenceGrowth, SteeredBatch" in out
    for card in CARDS:
        assert f"\n{card.name} " in out


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_has_a_plan(config: Path, plan) -> None:
    out = plan("--config", str(config), "--gpu", "H200")
    assert out.startswith(f"{config.stem}: ")
    assert "unknown" not in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            [*SMALL, "--gpu", "H1"],
            "plan.py: error: --gpu: no card 'H1' is known; take one of A100,",
        ),
        ([*SMALL, "--model.net.widht=3"], "plan.py: error: .*'widht' is not accepted"),
        ([*SMALL, "--model.net.width=33"], "model.net width: 33 is not divisible"),
        ([*SMALL, "--model.net.max_sequence_length=31"], "sequence_length: 32 is longer"),
        ([*SMALL, "--model.optimizer.momentum=2"], "model.optimizer: .*momentum 2"),
        ([*SMALL, "--schedule.table=[]"], "max_steps: -1, and no schedule.table"),
        ([*SMALL, "--trainer.max_steps=0"], "trainer.max_steps: 0 is less than 1"),
        ([*SMALL, "--picture=plan.pdf"], r"plan.pdf: name a file that ends in .png or .svg"),
        ([*SMALL, "--picture=plan.png"], r"matplotlib is not installed; .*\[plot\]"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    words, says: str, plan, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were missing
    with pytest.raises(SystemExit) as stop:
        plan(*words)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert re.search(says, lines[0])


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture(suffix: str, plan, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plan.{suffix}"
    plan(*SMALL, "--picture", str(path))
    drawn = path.read_bytes()
    assert len(drawn) > 5000
    if suffix == "svg":
        text = drawn.decode()
        for words in ("sequence length", "tokens per step", "learning rates", "momentum"):
            assert words in text
        assert "validations: 4" in text
        plan(*SMALL, "--picture", str(path))
        assert path.read_bytes() == drawn  # the same every time


@pytest.mark.parametrize("method", ["muon", "adamw"])
def test_bytes_that_do_not_depend_on_batches_are_exact(method: str) -> None:
    def optimizer(groups):
        return MuonAdamW(groups, groups={"block_matrices": {"method": method}})

    with torch.device("meta"):
        net = FastGPT(**SIZES, num_heads=2)
    planned = fixed_costs(net, optimizer)
    net = FastGPT(**SIZES, num_heads=2)
    built = optimizer(parameter_groups(net))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    net(tokens, tokens).backward()
    built.step()
    state = sum(value.nbytes for kept in built.state.values() for value in kept.values())
    weights = sum(tensor.nbytes for tensor in [*net.parameters(), *net.buffers()])
    assert planned[:3] == (weights, sum(p.grad.nbytes for p in net.parameters()), state)
    assert (planned.flops > 0) == (method == "muon")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_activations_are_what_autograd_keeps(precision: str) -> None:
    with torch.device("meta"):
        net = GPT(**SIZES, num_heads=2)
    planned = activation_bytes(net, 3, 16, precision=precision)
    net, kept = GPT(**SIZES, num_heads=2), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.zeros(3, 17, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"),
    ):
        net(tokens[:, :-1], tokens[:, 1:])
    for parameter in net.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert planned.kept == sum(kept.values())
    assert planned.largest == 3 * 16 * 96 * 4  # fp32 logits


def test_roofline() -> None:
    card = card_named("A100")._replace(flops=1e12, bandwidth=1e9)
    slow, wide = Cost(flops=1e12, moved=1), Cost(flops=1, moved=1e9)
    assert slow.bound(card) == "products"
    assert slow.seconds(card) > 1
    assert (wide.bound(card), wide.seconds(card)) == ("memory", 1.0)
    assert Fixed(100, 100, 350, 0).seconds(card) == pytest.approx(1000 / 1e9)
    assert Activations(3, 2).peak == 5


@pytest.mark.parametrize(
    ("head", "seconds"),
    [({}, 1.54), ({"cutoffs": [4096, 16384], "shares": [0.25, 0.1]}, 1.01)],
    ids=["full", "adaptive"],
)
def test_time_agrees_with_a_roofline_of_each_kernel(head, seconds: float) -> None:
    """8 layers of width 384 on an A100, for a million tokens: within the ±25% of both."""
    with torch.device("meta"):
        net = FastGPT(**head)
    kept = activation_bytes(net, 32, 1024, precision="bf16-mixed")
    fixed = fixed_costs(net, MuonAdamW)
    cost = micro_batch_cost(net, 32, 1024, fixed=fixed, kept=kept)
    million = cost.seconds(card_named("A100")) / (32 * 1024) * 1e6
    assert million == pytest.approx(seconds, rel=0.25)


@pytest.mark.parametrize(
    "net",
    [
        lambda: FastGPT(width=2560, num_heads=20, num_blocks=16),
        lambda: HLB041(width=2560, num_blocks=27),
    ],
    ids=["FastGPT", "HLB041"],
)
def test_networks_of_any_size_have_a_plan(net) -> None:
    with torch.device("meta"):
        large = net()
    parameters = sum(p.numel() for p in large.parameters())
    assert 1.3e9 < parameters < 1.7e9
    fixed = fixed_costs(large, MuonAdamW)
    kept = activation_bytes(large, 16, 1024, precision="bf16-mixed")
    assert fixed.optimizer == pytest.approx(8 * parameters, rel=1e-3)
    assert 1e10 < kept.kept < 1e11
    cost = micro_batch_cost(large, 16, 1024, fixed=fixed, kept=kept)
    assert cost.flops > 6 * 16 * 1024 * 1e9
