"""Plans of runs that are never started: shapes, memory and time."""

import json
import re
import sys
from pathlib import Path

import plan as script
import pytest
import torch
from conftest import CONFIGS

from hlbgpt.models import GPT, FastGPT
from hlbgpt.optim import MuonAdamW, parameter_groups
from hlbgpt.planning import Shape, plan_memory, plan_run
from hlbgpt.utils.hardware import GPUS, gpu_named

SIZES = {"vocab_size": 96, "max_sequence_length": 32, "width": 16, "num_blocks": 2}
TABLE = [
    {"tokens": 0, "sequence_length": 16, "step_tokens": 256, "lr": 1.0, "validate_every": 1024},
    {"tokens": 2048, "sequence_length": 32, "momentum": 0.9},
    {"tokens": 4096, "lr": 0.1, "momentum": 0.95},
]
SPEEDRUN = ["--config", str(CONFIGS / "speedrun.yaml")]
SMALL = [
    *SPEEDRUN,
    f"--schedule.table={json.dumps(TABLE)}",
    "--schedule.micro_batch_tokens=128",
    *("--model.net.init_args.width=32", "--model.net.init_args.num_heads=2"),
    "--model.net.init_args.num_blocks=2",
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


def test_plan_of_a_schedule(plan, tmp_path: Path) -> None:
    out = plan(*SMALL, "--gpu", "a100")
    assert "16 steps, 4,096 tokens" in out
    shapes = [line.split() for line in out.splitlines() if " x " in line][1:]
    assert shapes == [
        ["16", "x", "8", "x", "2", "8", "2,048"],
        ["32", "x", "4", "x", "2", "8", "2,048"],
    ]
    assert "\nA100 " in out
    assert "\nH100" not in out
    assert not list(tmp_path.iterdir())


def test_plan_without_a_schedule_uses_the_settings_of_the_data(plan) -> None:
    words = ["--config", str(CONFIGS / "hlb041.yaml"), "--trainer.max_steps=10"]
    out = plan(*words, "--data.micro_batches=3")
    assert f"10 steps, {10 * 3 * 56 * 1024:,} tokens" in out
    assert all(f"\n{gpu.name} " in out for gpu in GPUS)
    assert plan_run([*words, "--data.max_tokens=57345"]).tokens == 2 * 56 * 1024


def test_times_follow_from_flops_and_peak() -> None:
    plan, gpu = plan_run(SPEEDRUN), gpu_named("A100")
    each = [
        n * w * m * steps * plan.net.flops_per_token(n) for (n, w, m), steps in plan.steps.items()
    ]
    assert plan.flops == pytest.approx(sum(each))
    low, high = sum(each) / gpu.flops / 0.5, sum(each) / gpu.flops / 0.15
    assert f" {low:.0f} to {high:.0f} " in script.report(plan, [gpu])


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_has_a_plan(config: Path, plan) -> None:
    assert plan("--config", str(config), "--gpu", "H200").startswith(f"{config.stem}: ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*SMALL, "--gpu", "H1"], "plan.py: error: --gpu: no GPU 'H1' is known; use one of A100,"),
        ([*SMALL, "--model.net.widht=3"], "plan.py: error: .*'widht' is not accepted"),
        ([*SMALL, "--model.net.width=33"], "33 is not divisible"),
        (
            [*SMALL, "--model.net.max_sequence_length=31"],
            "schedule.table sequence_length: 32 is longer",
        ),
        ([*SMALL, "--model.optimizer.momentum=2"], "momentum"),
        ([*SMALL, "--schedule.table=[]"], "max_steps: -1, and no schedule.table"),
    ],
)
def test_errors_take_one_line(words: list[str], says: str, plan, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        plan(*words)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert re.search(says, lines[0])


@pytest.mark.parametrize("method", ["muon", "adamw"])
def test_memory_that_does_not_depend_on_batches_is_exact(method: str) -> None:
    def optimizer(groups):
        return MuonAdamW(groups, groups={"block_matrices": {"method": method}})

    with torch.device("meta"):
        net = FastGPT(**SIZES, num_heads=2)
    planned = plan_memory(net, optimizer, Shape(8, 2, 1), autocast=None)
    net = FastGPT(**SIZES, num_heads=2)
    built = optimizer(parameter_groups(net))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    net(tokens, tokens).backward()
    built.step()
    state = [value for values in built.state.values() for value in values.values()]
    assert planned["weights"] == sum(x.nbytes for x in [*net.parameters(), *net.buffers()])
    assert planned["gradients"] == sum(p.grad.nbytes for p in net.parameters())
    assert planned["optimizer state"] == sum(value.nbytes for value in state)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_activations_are_what_autograd_saves(autocast: torch.dtype | None) -> None:
    with torch.device("meta"):
        net = GPT(**SIZES, num_heads=2)
    planned = plan_memory(net, MuonAdamW, Shape(16, 3, 1), autocast=autocast)
    net, saved = GPT(**SIZES, num_heads=2), {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.zeros(3, 17, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None),
    ):
        net(tokens[:, :-1], tokens[:, 1:])
    for parameter in net.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    assert planned["activations"] == sum(saved.values())
