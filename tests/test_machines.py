"""The overlays for small machines: they fit into memory and do not change what is learned."""

import json
import math
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import CONFIGS, fitting
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hlbgpt.cli.main import Built, build
from hlbgpt.data import TextFiles, TokenDataModule
from hlbgpt.models import GPT, AdaptiveSoftmax, FastGPT, token_scores
from hlbgpt.optim import parameter_groups
from hlbgpt.optim.schedules import plan_steps
from hlbgpt.training.module import LanguageModule

MACHINES = sorted((CONFIGS / "machines").glob("*.yaml"))
RECIPES = ["baseline", "speedrun"]
LENGTHS = {"baseline": 256, "speedrun": 1024}
SMALL_STEP = 4096  # tokens of the micro-batches that the speedrun's `auto` finds at least
CONTEXT = 0.5e9  # bytes that CUDA itself takes
SIZES = {"vocab_size": 64, "max_sequence_length": 8, "width": 16, "num_heads": 2, "num_blocks": 2}


def built(recipe: str, *overlays: Path) -> Built:
    """The settings of a run and what is built of them, without memory."""
    configs = [CONFIGS / f"{recipe}.yaml", *overlays]
    words = [word for config in configs for word in ("--config", str(config))]
    return build(words, device="meta")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that exist at a time."""

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


def peak_memory(run: Built, windows: int, length: int) -> int:
    """Bytes that fp32 training and evaluation take at most without torch.compile."""
    eval_windows = run.config.data.eval_batch_size
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        run.net.to_empty(device="cpu")
        optimizer = run.optimizer(parameter_groups(run.net))
        batch = torch.zeros(windows, length + 1, dtype=torch.int64)
        for _ in range(2):
            run.net(batch[:, :-1], batch[:, 1:]).backward()
            optimizer.step()
        with torch.no_grad():
            token_scores(run.net, torch.zeros(eval_windows, length + 1, dtype=torch.int64))
    return live.peak


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("machine", MACHINES, ids=lambda path: path.stem)
def test_overlays_change_memory_and_not_what_is_learned(recipe: str, machine: Path) -> None:
    free = {  # these concern memory, speed and the device
        "trainer": {"accelerator", "devices", "precision", "strategy"},
        "schedule": {"micro_batch_tokens"},
        "model": {"compile", "net"},
        "data": {"micro_batches", "micro_batch_size", "eval_batch_size"},
    }
    overlay = yaml.safe_load(machine.read_text())
    assert all(set(keys) <= free[section] for section, keys in overlay.items())
    net = overlay.get("model", {}).get("net", {"init_args": {}})
    assert set(net["init_args"]) <= {"loss_chunk_tokens"}
    alone, laid_over = built(recipe), built(recipe, machine)
    assert laid_over.name == recipe
    if recipe == "baseline":
        for data in (alone.config.data, laid_over.config.data):
            assert data.micro_batches * data.micro_batch_size == 64
    else:
        size = laid_over.schedule.micro_batch_tokens
        steps = plan_steps(alone.schedule.table, micro_batch_tokens=16384)
        small = plan_steps(
            laid_over.schedule.table, micro_batch_tokens=SMALL_STEP if size == "auto" else size
        )
        assert [step.tokens() for step in small] == [step.tokens() for step in steps]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("memory", "overlay"), [(8, "8gb"), (16, "16gb"), (24, None)])
def test_recipes_fit_into_three_quarters_of_a_gpu(
    recipe: str, memory: int, overlay: str | None
) -> None:
    run = built(recipe, *[path for path in MACHINES if path.stem == overlay])
    length = LENGTHS[recipe]
    windows = run.config.data.micro_batch_size if recipe == "baseline" else SMALL_STEP // length
    assert run.config.data.eval_sequence_length == length
    assert peak_memory(run, windows, length) < 0.75 * (memory * 1e9 - CONTEXT)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fit_on_a_cpu(recipe: str, hlbgpt, tiny: list[str]) -> None:
    config, overlay = CONFIGS / f"{recipe}.yaml", CONFIGS / "machines" / "cpu.yaml"
    keys = ("batch_size", "compile", "accelerator")
    small = [word for word in fitting(config, tiny) if not any(key in word for key in keys)]
    out = hlbgpt("fit", "--config", config, "--config", overlay, *small)
    assert "target NOT met" in out
    record = json.loads(Path(f"runs/{recipe}/version_0/record.json").read_text())
    tokens = {"baseline": 64 * 32, "speedrun": 128}[recipe]
    assert (record["step"], record["tokens"]) == (4, 4 * tokens)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="needs a machine without Apple GPU")
def test_the_overlay_for_macs_is_refused_elsewhere(hlbgpt, capfd) -> None:
    overlay = CONFIGS / "machines" / "mps.yaml"
    with pytest.raises(SystemExit):
        hlbgpt("fit", "--config", CONFIGS / "speedrun.yaml", "--config", overlay)
    assert capfd.readouterr().err.startswith("hlbgpt: error: trainer.accelerator: 'mps' asked for")


class NoDoubles(TorchDispatchMode):
    """Refuses tensor types on a device that not every Apple GPU has."""

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
        lambda: FastGPT(**SIZES, cutoffs=[16, 32], capacity=[0.5, 0.5], bigram_buckets=8),
    ],
    ids=["GPT", "FastGPT"],
)
def test_apple_gpus_train_and_evaluate_without_doubles(make) -> None:
    module, data = LanguageModule(make(), AdamW), TokenDataModule(TextFiles(), "bytes")
    module.net.vocab_size, data.eval_sequence_length = 256, 8
    strategy = SingleDeviceStrategy(torch.device("mps"))
    module._trainer = SimpleNamespace(strategy=strategy, datamodule=data)
    module.setup("validate")
    batch = torch.randint(0, 64, (2, 9))
    with NoDoubles("cpu"):  # as if it were the Apple GPU
        module.net(batch[:, :-1], batch[:, 1:]).backward()
        with torch.no_grad():
            module.evaluation.update(module.net, batch)
    loss, _, tokens, windows = module.evaluation.compute()
    assert loss / tokens == pytest.approx(math.log(64), abs=2)
    assert loss.dtype == torch.float32
    assert (tokens, windows) == (16, 2)


def test_token_counts_reach_apple_gpus_without_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda _, source: copied.append(source.dtype))
    with FakeTensorMode(), NoDoubles("mps"), torch.device("mps"):  # without memory, so anywhere
        head = AdaptiveSoftmax(8, 64, cutoffs=(16,))
        head.init_from_token_counts(torch.ones(50, dtype=torch.int64))
    assert copied == [torch.int64, torch.float32]
