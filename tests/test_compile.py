"""torch.compile changes neither the results nor the names in checkpoints."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS
from helpers import make, sgd, trainer
from torch import nn

ARGUMENTS = [
    "--config",
    str(CONFIGS / "baseline.yaml"),
    "--trainer.precision=bf16-mixed",
    "--trainer.max_steps=30",
    "--model.lr_scheduler.init_args.total_steps=30",
    "--trainer.val_check_interval=30",
    "--time_to_target.target=0",
]


@pytest.fixture
def quick_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and differentiate as torch.compile does, without generating code."""
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda net: compile_(net, backend="aot_eager"))
    torch.compiler.reset()


def value(hlbgpt, tiny: list[str], compiled: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Record and checkpoint of a run of 30 steps."""
    small = [argument for argument in tiny if "compile" not in argument]
    hlbgpt("fit", *small[:1], *ARGUMENTS[:2], *small, *ARGUMENTS[2:], f"--model.compile={compiled}")
    folder = max(Path("runs/baseline").iterdir())
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return json.loads((folder / "record.json").read_text()), checkpoint


def check_compiled_equals_eager(hlbgpt, tiny: list[str]) -> None:
    eager, eager_checkpoint = value(hlbgpt, tiny, compiled=False)
    record, checkpoint = value(hlbgpt, tiny, compiled=True)
    # bf16 rounds to 3 digits; fused kernels round less often.
    assert record["value"] == pytest.approx(eager["value"], abs=0.02)
    assert record["value"] < math.log(256) - 0.1
    assert eager["compile_seconds"] == 0 < record["compile_seconds"] < record["wall_seconds"]
    assert checkpoint["state_dict"].keys() == eager_checkpoint["state_dict"].keys()
    assert not any("_orig_mod" in key for key in checkpoint["state_dict"])
    # A checkpoint of a compiled run loads without compilation, and the other way round.
    last = "runs/baseline/version_{}/checkpoints/last.ckpt"
    shown = [
        hlbgpt("validate", f"--ckpt_path={last.format(run)}", f"--model.compile={compiled}")
        for run, compiled in ((1, False), (1, True))
    ]
    assert all(f"{record['value']:.4f}"[:5] in out for out in shown)


def test_compiled_equals_eager(hlbgpt, tiny: list[str], quick_compile: None) -> None:
    check_compiled_equals_eager(hlbgpt, tiny)


@pytest.mark.slow
def test_inductor_equals_eager(hlbgpt, tiny: list[str]) -> None:
    torch.compiler.reset()
    check_compiled_equals_eager(hlbgpt, tiny)


def test_everything_is_compiled_before_the_clock(
    folder: Path, tmp_path: Path, quick_compile: None
) -> None:
    """Training and validating real batches compiles nothing more, and starts where it would."""
    from torch._dynamo.utils import counters

    def run(compiled: bool) -> tuple[dict[str, Any], int, int]:
        module, data = make(folder, tmp_path, optimizer=sgd(0.1), eval_batch_size=16)
        module.compile_net = compiled
        seen: list[int] = []
        start = module.on_fit_start

        def counted() -> None:
            start()
            seen.append(counters["stats"]["unique_graphs"])

        module.on_fit_start = counted
        torch.manual_seed(1)
        run = trainer(
            tmp_path,
            max_steps=6,
            limit_val_batches=1.0,
            val_check_interval=3,
        )
        run.fit(module, data)
        state = {"weights": [p.detach().clone() for p in module.parameters()]}
        return state, seen[0], counters["stats"]["unique_graphs"]

    counters.clear()
    state, warm, end = run(compiled=True)
    assert warm == end > 0
    random_state = torch.random.get_rng_state()
    eager, _, _ = run(compiled=False)
    assert torch.equal(random_state, torch.random.get_rng_state())
    for ours, theirs in zip(state["weights"], eager["weights"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
