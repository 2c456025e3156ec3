"""torch.compile changes neither the results nor the names in checkpoints."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS
from helpers import make, sgd, small_gpt, trainer
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from hlbgpt.callbacks import LastCheckpoint, TokenSchedule
from hlbgpt.models import FastGPT
from hlbgpt.optim import MuonAdamW, parameter_groups
from hlbgpt.optim.schedules import ScheduleRow
from hlbgpt.training.compilation import compile_in_place, warm_up_optimizer
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.errors import InputError

ARGUMENTS = [
    "--config",
    str(CONFIGS / "baseline.yaml"),
    "--trainer.precision=bf16-mixed",
    "--trainer.max_steps=30",
    "--model.lr_scheduler.init_args.total_steps=30",
    "--trainer.val_check_interval=30",
    "--time_to_target.target=0",
]


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

    def run(compiled: bool) -> tuple[list[torch.Tensor], list[int]]:
        module, data = make(folder, tmp_path, optimizer=sgd(0.1), eval_batch_size=16)
        module.compile_net = compiled
        torch.manual_seed(1)
        arguments = {"max_steps": 6, "limit_val_batches": 1.0, "val_check_interval": 3}
        graphs = count_graphs(module)
        trainer(tmp_path, **arguments).fit(module, data)
        graphs.append(counters["stats"]["unique_graphs"])
        return [p.detach().clone() for p in module.parameters()], graphs

    weights, (warm, end) = run(compiled=True)
    assert warm == end > 0
    random_state = torch.random.get_rng_state()
    eager, _ = run(compiled=False)
    assert torch.equal(random_state, torch.random.get_rng_state())
    for ours, theirs in zip(weights, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def count_graphs(module: LanguageModule) -> list[int]:
    """A list that gets the number of graphs compiled by the time that training starts."""
    counters.clear()
    seen: list[int] = []
    start = module.on_fit_start

    def counted() -> None:
        start()
        seen.append(counters["stats"]["unique_graphs"])

    module.on_fit_start = counted  # type: ignore[method-assign]
    return seen


@pytest.mark.slow
def test_each_shape_of_a_schedule_is_compiled_once(
    folder: Path, tmp_path: Path, quick_compile: None
) -> None:
    """More shapes than torch compiles by default, static, also by a run resumed in the middle."""
    rows = [ScheduleRow(0, sequence_length=4, step_tokens=64, lr=1.0, validate_every=300)]
    rows += [ScheduleRow(128 * i, sequence_length=4 + 2 * i) for i in range(1, 9)]
    rows.append(ScheduleRow(1200, lr=0.5))
    for steps in (12, -1):
        torch.compiler.reset()
        module, data = make(folder, tmp_path, optimizer=sgd(0.1), eval_batch_size=16)
        module.compile_net = True
        schedule = TokenSchedule(rows, micro_batch_tokens=64)
        run = trainer(
            tmp_path,
            max_steps=steps,
            limit_val_batches=1.0,
            callbacks=[schedule, LastCheckpoint()],
        )
        graphs = count_graphs(module)
        last = tmp_path / "checkpoints" / "last.ckpt"
        run.fit(module, data, ckpt_path=last if steps == -1 else None)
        shapes = {step.sequence_length for step in schedule.steps}
        assert len(shapes) == 9
        assert graphs == [10]  # with that of evaluation
        assert counters["stats"]["unique_graphs"] == 10


@pytest.mark.parametrize("chosen", [None, "mine"])
def test_compiled_code_is_kept_with_the_tokens(
    chosen: str | None, tmp_path: Path, quick_compile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user names another folder."""
    folder = str(tmp_path / chosen) if chosen else default_cache_dir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
    compile_in_place(small_gpt(), torch.device("cpu"), tmp_path)
    assert cache_dir() == str(tmp_path / (chosen or "compiled"))


class NoisySGD(torch.optim.SGD):
    """Draws random numbers in its step."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for param in self.param_groups[0]["params"]:
            param.data += 0.01 * torch.randn_like(param)
        return loss


def test_shapes_that_depend_on_the_text_are_refused(folder: Path, tmp_path: Path) -> None:
    net = FastGPT(vocab_size=256, max_sequence_length=32, width=16, num_heads=2, cutoffs=[64])
    module, data = make(folder, tmp_path, net=net)
    module.compile_net = True
    with pytest.raises(InputError, match=r"model\.net\.capacity: null, .* set 1 fractions"):
        trainer(tmp_path, max_steps=1).fit(module, data)


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda groups: MuonAdamW(groups, weight_decay=0.1),
        lambda groups: torch.optim.AdamW(groups, fused=True),
        lambda groups: torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1),
        lambda groups: torch.optim.Adagrad(groups, lr=0.1),  # has state before its first step
        NoisySGD,
        lambda groups: torch.optim.LBFGS([p for group in groups for p in group["params"]]),
    ],
    ids=["MuonAdamW", "AdamW", "SGD", "Adagrad", "noise", "LBFGS"],
)
def test_warming_up_the_optimizer_changes_nothing(make_optimizer: Any, warm: int) -> None:
    """Neither the weights and the state it leaves, nor any step that follows."""
    tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))

    def train(steps: int, optimizer: torch.optim.Optimizer, net: nn.Module) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = net(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)

    ends = []
    for warmed in (False, True):
        net = small_gpt()
        torch.manual_seed(1)
        optimizer = make_optimizer(parameter_groups(net))
        train(warm, optimizer, net)
        if warmed:
            before = copy.deepcopy(optimizer.state_dict())
            assert warm_up_optimizer(optimizer) > 0
            after = optimizer.state_dict()
            assert after["param_groups"] == before["param_groups"]
            torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
            assert all(p.grad is None for p in net.parameters())
        train(1, optimizer, net)
        ends.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
