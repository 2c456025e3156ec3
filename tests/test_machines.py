"""The overlays for small machines: they fit, and change nothing of what is learned."""

import contextlib
import json
import math
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import CONFIGS, fitting
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hlbgpt.data import TextFiles, TokenDataModule
from hlbgpt.models import GPT, AdaptiveHead, FastGPT, Network
from hlbgpt.optim.schedules import plan_steps
from hlbgpt.planning.estimates import fixed_costs
from hlbgpt.planning.plan import Settings
from hlbgpt.runs.config import config_name
from hlbgpt.training.module import LanguageModule

MACHINES = sorted((CONFIGS / "machines").glob("*.yaml"))
RECIPES = ["baseline", "speedrun"]
CONTEXT = 0.5e9  # bytes that CUDA itself takes
SIZES = {"vocab_size": 64, "max_sequence_length": 8, "width": 16, "num_heads": 2, "num_blocks": 2}


def settings(monkeypatch: pytest.MonkeyPatch, *configs: Path):
    """The settings of a run and what is built of them, without memory."""
    words = [word for config in configs for word in ("--config", str(config))]
    monkeypatch.setattr(sys, "argv", ["hlbgpt", "fit", *words])
    with contextlib.ExitStack() as resources:
        parsed = Settings(resources)
    return parsed.config["fit"], parsed.config_init["fit"]


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors that are made and not yet gone."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._drop, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def _drop(self, key: int) -> None:
        self.now -= self._known.pop(key)


def peak(net: Network, windows: int, length: int, *, learns: bool) -> int:
    """Bytes that a batch takes at most, gradients included; torch.compile needs less."""
    for module in net.modules():
        if getattr(module, "shares", ()) is None:
            module.shares = module.expected_shares()
    with FakeTensorMode():
        named = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        own = {
            name: torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", requires_grad=tensor.requires_grad
            )
            for name, tensor in named.items()
        }
        batch = torch.zeros(windows, length + 1, dtype=torch.int64)
        arguments = batch[:, :-1], batch[:, 1:]
        with LiveBytes() as live, torch.set_grad_enabled(learns):
            if learns:
                functional_call(net, own, arguments).backward()
            else:
                functional_call(net, own, arguments, {"per_token": True})
        return live.peak


@pytest.mark.parametrize("recipe", RECIPES)
def test_overlays_change_memory_and_not_what_is_learned(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = CONFIGS / f"{recipe}.yaml"
    wanted, _ = settings(monkeypatch, alone)

    def step_windows(config) -> int:
        return config.data.micro_batch_size * config.trainer.accumulate_grad_batches

    def interval(config) -> float:  # steps between two validations
        return config.trainer.val_check_interval / config.trainer.accumulate_grad_batches

    # What is about memory, speed and the device; the rest has to stay.
    free = {
        "trainer": {"accelerator", "precision", "accumulate_grad_batches", "val_check_interval"},
        "schedule": {"micro_batch_tokens"},
        "model": {"compile", "net"},
        "data": {"micro_batch_size", "eval_batch_size"},
    }
    assert len(MACHINES) == 5
    for machine in MACHINES:
        config, built = settings(monkeypatch, alone, machine)
        overlay = yaml.safe_load(machine.read_text())
        assert all(set(keys) <= free[section] for section, keys in overlay.items())
        assert set(overlay.get("model", {}).get("net", {}).get("init_args", {})) <= {"loss_chunk"}
        if recipe == "baseline":
            assert step_windows(config) == step_windows(wanted) == 64
            assert interval(config) == interval(wanted)
        else:
            tokens = config.schedule.micro_batch_tokens
            steps = plan_steps(built.schedule.table, micro_batch_tokens=16384)
            small = plan_steps(
                built.schedule.table, micro_batch_tokens=4096 if tokens == "auto" else tokens
            )
            assert [step.tokens() for step in small] == [step.tokens() for step in steps]
            assert all(step.batch_size * step.sequence_length <= 4096 for step in small)
        assert config_name(config.config) == recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_overlays_fit_their_cards(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 32-true, which takes more than bf16-mixed, and with a quarter to spare."""
    # As if compiled: then evaluation takes the most.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    run = {
        card: settings(monkeypatch, CONFIGS / f"{recipe}.yaml", CONFIGS / "machines" / card)
        for card in ("8gb.yaml", "16gb.yaml", "24gb.yaml")
    }
    _, built = run["8gb.yaml"]
    net, fixed = built.model.net, fixed_costs(built.model.net, built.model.optimizer)
    length = {"baseline": 256, "speedrun": 1024}[recipe]
    sizes = [4, 64]

    def taken(learns: bool):
        # Convex, so that a straight line between two sizes is above what is between.
        peaks = [peak(net, size, length, learns=learns) for size in sizes]
        return lambda windows: np.interp(windows, sizes, peaks)

    training, evaluation = taken(True), taken(False)
    for name, (config, _) in run.items():
        card, data = float(name.removesuffix("gb.yaml")) * 1e9 - CONTEXT, config.data
        kept = fixed.weights + (fixed.optimizer or 0)
        # The speedrun's `auto` takes what there is; 4096 tokens, fewer would not do, are there.
        windows = data.micro_batch_size if recipe == "baseline" else 4
        assert sizes[0] <= windows <= sizes[-1]
        assert kept + training(windows) < 0.75 * card
        assert sizes[0] <= data.eval_batch_size <= sizes[-1]
        assert kept + evaluation(data.eval_batch_size) < 0.75 * card


@pytest.mark.parametrize("recipe", RECIPES)
def test_fit_on_a_cpu(recipe: str, hlbgpt, tiny: list[str]) -> None:
    config, overlay = CONFIGS / f"{recipe}.yaml", CONFIGS / "machines" / "cpu.yaml"
    keys = ("batch_size", "compile", "accelerator", "interval")
    small = [word for word in fitting(config, tiny) if not any(key in word for key in keys)]
    out = hlbgpt("fit", "--config", config, "--config", overlay, *small)
    assert "target NOT met" in out
    record = json.loads(Path(f"runs/{recipe}/version_0/record.json").read_text())
    tokens = {"baseline": 64 * 32, "speedrun": 128}[recipe]
    assert (record["step"], record["tokens"]) == (4, 4 * tokens)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="asks for a Mac's GPU to be missing")
def test_without_a_macs_gpu_its_overlay_is_refused(hlbgpt, tiny: list[str], capfd) -> None:
    overlay = CONFIGS / "machines" / "mps.yaml"
    words = ["--config", CONFIGS / "speedrun.yaml", "--config", overlay]
    with pytest.raises(SystemExit):
        hlbgpt("fit", *words)
    assert capfd.readouterr().err.startswith("hlbgpt: error: trainer.accelerator: 'mps' asked for")


class NoDoubles(TorchDispatchMode):
    """Refuses, on a device, the types of numbers that not every Apple GPU has."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device:
                assert tensor.dtype not in (torch.float64, torch.uint16), func
        return result


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPT(**SIZES),
        lambda: FastGPT(**SIZES, cutoffs=[16, 32], shares=[0.5, 0.5], bigram_size=8),
    ],
    ids=["GPT", "FastGPT"],
)
def test_nothing_on_a_macs_gpu_is_double(make) -> None:
    module, data = LanguageModule(make(), AdamW), TokenDataModule(TextFiles(), "bytes")
    module.net.vocab_size, data.eval_sequence_length, data.sequence_length = 256, 8, 8
    module._trainer = SimpleNamespace(
        accumulate_grad_batches=1,
        strategy=SimpleNamespace(root_device=torch.device("mps"), checkpoint_io=None),
        datamodule=data,
    )
    module.setup("fit")
    batch = torch.randint(0, 64, (2, 9))
    with NoDoubles("cpu"):  # which stands for the GPU
        module.net(batch[:, :-1], batch[:, 1:]).backward()
        with torch.no_grad():
            module._measure(batch)
    assert module.eval_loss.compute() == pytest.approx(math.log(64), abs=2)
    assert module.eval_loss.compute().dtype == torch.float32


def test_counts_are_no_doubles_on_a_macs_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda _, source: copied.append(source.dtype))
    with FakeTensorMode(), NoDoubles("mps"), torch.device("mps"):  # without memory, so anywhere
        head = AdaptiveHead(8, 64, cutoffs=(16,))
        head.use_token_counts(torch.ones(50, dtype=torch.int64))
    assert copied == [torch.int64, torch.float32]


def test_batches_reach_a_macs_gpu_as_int64(monkeypatch: pytest.MonkeyPatch) -> None:
    data, mps, convert = TokenDataModule(TextFiles(), "bytes"), torch.device("mps"), torch.Tensor.to
    moved = []

    def to(tensor: torch.Tensor, target: object, **options: bool) -> torch.Tensor:
        if target != mps:
            return convert(tensor, target, **options)
        moved.append(tensor.dtype)
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    data.transfer_batch_to_device(torch.zeros(2, 9, dtype=torch.uint16), mps, 0)
    assert moved == [torch.int64]
