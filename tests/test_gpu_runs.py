"""Runs on a GPU: what compiles, what waits, what takes memory, how a run ends and goes on.

What a CPU can do runs there too, so that the tests themselves are tested. Tests marked `no_numbers`
ask nothing about results, so that they hold wherever torch compiles for a GPU and launches kernels.
"""

import contextlib
import gc
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import CONFIGS, QUICKSTART, fitting, on_gpu, slow_on_cpu
from helpers import At, error, fit, make, read_record, sgd, trainer
from recipes import MAX_STEPS, RECIPES, SMALL, kind_of
from test_divergence import Poison
from test_resume import StopAfter, StopError, assert_same, run

from hlbgpt.callbacks import LastCheckpoint, StopOnDivergence, TimeToTarget, TokenSchedule
from hlbgpt.models import GPT
from hlbgpt.optim.schedules import ScheduleRow
from hlbgpt.utils.errors import DivergedError
from hlbgpt.utils.hardware import gpu_of

recipes = pytest.mark.parametrize("recipe", RECIPES)


# --- compilation ----------------------------------------------------------------------------------


def graphs(*_: Any) -> int:
    """Number of graphs that were compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.no_numbers
@slow_on_cpu
@recipes
def test_nothing_compiles_after_the_warm_up(
    device: torch.device, recipe: str, folder: Path, tmp_path: Path
) -> None:
    """At any shape, in evaluation with its padded last batch, and resumed in a later stage."""
    path = tmp_path / "stop.ckpt"
    kind = kind_of(recipe, device, compiled=True, num_sanity_val_steps=0)
    for stops, resume in (([StopAfter(MAX_STEPS - 3, path)], None), ([], path)):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        start = At("on_train_start", graphs)
        with pytest.raises(StopError) if stops else contextlib.nullcontext():
            run(folder, tmp_path / "run", start, *stops, resume=resume, **kind)
        assert start.found == [graphs()]
        assert graphs() >= 2  # training and evaluation


@pytest.mark.no_numbers
@slow_on_cpu
@recipes
def test_the_warm_up_leaves_no_trace(
    device: torch.device, recipe: str, folder: Path, tmp_path: Path
) -> None:
    """Training starts with the weights and the random state with which an eager run starts."""

    def state(_: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        assert all(parameter.grad is None for parameter in module.parameters())
        random = [torch.get_rng_state()]
        random += [torch.cuda.get_rng_state()] if device.type == "cuda" else []
        weights = {k: v.to("cpu", copy=True) for k, v in module.state_dict().items()}
        return {"random": random, "weights": weights}

    starts = [At("on_train_start", state) for _ in range(2)]
    for start, compiled in zip(starts, (False, True), strict=True):
        kind = kind_of(recipe, device, compiled=compiled)
        run(folder, tmp_path / f"{compiled}", start, **kind)
    assert_same(*(start.found for start in starts))


@slow_on_cpu
@recipes
def test_a_compiled_run_of_a_config_ends_as_an_eager_one(
    device: torch.device, recipe: str, hlbgpt: Any, tiny: list[str]
) -> None:
    """From the command line, in bf16: 0.02 nats apart at most, which is three digits."""
    config, values = CONFIGS / f"{recipe}.yaml", []
    for number, compiled in enumerate((True, False)):
        where = [f"--trainer.accelerator={device.type}", f"--model.compile={compiled}"]
        hlbgpt("fit", "--config", config, *fitting(config, tiny), *where)
        record = read_record(Path(f"runs/{recipe}/version_{number}"))
        assert (record["compile_seconds"] > 0) == compiled
        values.append(record["value"])
    assert values[0] == pytest.approx(values[1], abs=0.02)
    assert 1.0 < values[0] < 6.0


# --- waits ----------------------------------------------------------------------------------------


class NoWaits(L.Callback):
    """An error where the host waits for the GPU in an ordinary step; the last of the callbacks.

    From the end of the step before, so that the loader and all callbacks are watched. Every fifth
    step is logged, hlb-gpt's batch size looks at the gradient in odd steps, and validations wait.
    """

    steps = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        if not pl_module.validation_due:
            self.on_validation_end(trainer)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step + 1
        if step > 2 and step % 2 == 0 and step % 5 and step <= MAX_STEPS:
            self.steps += 1
            torch.cuda.set_sync_debug_mode("error")

    def on_exception(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")  # or what cleans up would raise another


@pytest.mark.no_numbers
@on_gpu
@pytest.mark.parametrize("compiled", [False, True])
@recipes
def test_no_ordinary_step_waits_for_the_gpu(
    device: torch.device, recipe: str, compiled: bool, folder: Path, tmp_path: Path
) -> None:
    watch = NoWaits()
    kind = kind_of(recipe, device, compiled=compiled, log_every_n_steps=5)
    run(folder, tmp_path / "run", StopOnDivergence(), LastCheckpoint(), watch, **kind)
    assert watch.steps == 5


@pytest.mark.no_numbers
@on_gpu
def test_the_clock_waits_for_the_gpu(device: torch.device, folder: Path, tmp_path: Path) -> None:
    """A kernel launched in the last step before a validation is over when the clock stops."""
    events: list[list[torch.cuda.Event]] = []

    def launch(_: L.Trainer, module: Any, *rest: Any) -> None:
        if module.validation_due:
            events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            events[-1][0].record()
            torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second
            events[-1][1].record()

    over = At("on_validation_start", lambda *_: all(end.query() for _, end in events))
    kind = kind_of("baseline", device, num_sanity_val_steps=0)
    run(folder, tmp_path / "run", At("on_train_batch_end", launch), over, **kind)
    assert over.found == [True, True, True]
    seconds = sum(start.elapsed_time(end) for start, end in events) / 1000
    assert read_record(tmp_path / "run")["train_seconds"] >= seconds


# --- memory ---------------------------------------------------------------------------------------


@pytest.fixture
def budget(device: torch.device) -> Iterator[Callable[..., None]]:
    """Allow no more than so many bytes of the GPU. On a CPU it does nothing."""

    def limit(size: int) -> None:
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_per_process_memory_fraction(size / torch.cuda.mem_get_info()[1])

    yield limit
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)


def one_step(
    device: torch.device, folder: Path, tmp_path: Path, micro_batch_tokens: Any
) -> tuple[int, torch.Tensor]:
    """The number of micro-batches of a step of 16384 tokens, and its gradient."""
    torch.manual_seed(0)
    net = GPT(**SMALL | {"vocab_size": 2048}, num_heads=2, num_blocks=2)
    before = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    table = [ScheduleRow(0, sequence_length=64, step_tokens=1 << 14), ScheduleRow(1 << 14)]
    schedule = TokenSchedule(table, micro_batch_tokens)
    module, data = make(folder, tmp_path, net=net, optimizer=sgd(1.0), seed=0)
    trainer(tmp_path, accelerator=device.type, max_steps=-1, callbacks=[schedule]).fit(module, data)
    after = torch.nn.utils.parameters_to_vector(net.cpu().parameters()).detach()
    return module.step_shape[0], after - before


@pytest.mark.no_numbers
def test_micro_batches_that_auto_chooses_fit(
    device: torch.device, folder: Path, tmp_path: Path, budget: Callable[..., None]
) -> None:
    """Into a GPU too small for the whole step, or else the allocator would say so."""
    budget(400 << 20)
    micro_batches, _ = one_step(device, folder, tmp_path, "auto")
    assert 2 <= micro_batches <= 8  # nor are they much smaller than they need be


def test_micro_batches_that_auto_chooses_change_no_gradient(
    device: torch.device, folder: Path, tmp_path: Path, budget: Callable[..., None]
) -> None:
    """But for the rounding of sums in fp32."""
    budget(400 << 20)
    auto, ours = one_step(device, folder, tmp_path, "auto")
    single, exact = one_step(device, folder, tmp_path, 512)
    assert auto < single == 32
    assert 0.01 < exact.norm() < 10  # of 20, the norm of the weights
    assert error(ours, exact) < 1e-4


@pytest.mark.no_numbers
@on_gpu
def test_peak_memory_of_the_record_is_the_allocators(
    device: torch.device, folder: Path, tmp_path: Path
) -> None:
    torch.cuda.reset_peak_memory_stats()
    peak = At("on_train_end", lambda *_: torch.cuda.max_memory_allocated())
    run(folder, tmp_path / "run", peak, **kind_of("baseline", device))
    record = read_record(tmp_path / "run")
    assert peak.found == [record["peak_memory_bytes"]]
    assert record["peak_memory_bytes"] > 4 * 4 * record["parameters"]  # weights to AdamW's moments


@pytest.mark.no_numbers
@on_gpu
def test_the_speedrun_fits_into_8_gb(
    device: torch.device, hlbgpt: Any, tiny: list[str], budget: Callable[..., None]
) -> None:
    """The whole network and its longest windows, eager, which takes the most; 0.6 GB are CUDA's."""
    budget(int(7.4e9))
    data = [argument for argument in tiny if "cache_dir" in argument or "source" in argument]
    table = "[{tokens: 0, sequence_length: 1024, step_tokens: 32768}, {tokens: 65536}]"
    small = ["--data.tokenizer=bytes", "--model.compile=false", f"--schedule.table={table}"]
    hlbgpt("fit", "--config", CONFIGS / "speedrun.yaml", *data, *small, "--data.eval_batch_size=4")
    record = read_record(Path("runs/speedrun/version_0"))
    assert record["step"] == 2
    assert record["peak_memory_bytes"] > 3e9  # or the test would show little


# --- how a run ends and goes on -------------------------------------------------------------------


@pytest.mark.parametrize("loss", [True, False])
def test_a_diverging_run_stops(
    device: torch.device, loss: bool, folder: Path, tmp_path: Path
) -> None:
    """Within a logging interval of the bad step, whether its loss or only its gradient is bad."""
    steps = At("on_before_optimizer_step", lambda trainer, *_: trainer.global_step + 1)
    poison = Poison(7, loss=loss, value=float("inf"))
    callbacks = [poison, steps, TimeToTarget(target=0.1), StopOnDivergence()]
    how = {"accelerator": device.type, "max_steps": 40, "val_check_interval": 50}
    with pytest.raises(DivergedError, match=r"the last finite loss was .* at step [67];"):
        fit(folder, tmp_path, *callbacks, log_every_n_steps=5, **how)
    assert steps.found[-1] <= 10
    assert not (tmp_path / "record.json").exists()


def test_quickstart_from_start_to_text(device: torch.device, hlbgpt: Any, tiny: list[str]) -> None:
    """A short run, its record, its loss again on a CPU within 1e-3, and the same text there."""
    data = [argument for argument in tiny if "cache_dir" in argument or "source" in argument]
    steps = ["--trainer.max_steps=40", "--model.lr_scheduler.total_steps=40"]
    out = hlbgpt("fit", *QUICKSTART, *data, *steps, f"--trainer.accelerator={device.type}")
    record = read_record(Path("runs/quickstart/version_0"))
    assert record["step"] == 40
    assert 1.0 < record["value"] < 3.5
    assert str(record["device"]) in out
    if device.type == "cuda":
        assert record["device"] == torch.cuda.get_device_name()
        assert (record["mfu"] is not None) == (gpu_of(device) is not None)
        if shutil.which("nvidia-smi"):
            assert re.fullmatch(r"\d+\.\d+[.\d]*", record["driver"])
    if record["mfu"] is not None:
        assert 0 < record["mfu"] < 1
    texts = []
    for accelerator in ("cpu", device.type):
        where = ["--ckpt_path=last", f"--trainer.accelerator={accelerator}"]
        table = hlbgpt("validate", *where)
        loss = re.search(r"val_loss\D+([\d.]+)", table)
        assert loss is not None
        assert float(loss[1]) == pytest.approx(record["value"], abs=1e-3)
        greedy = ["--model.sampling.temperature=0", "--model.sampling.max_new_tokens=20"]
        texts.append(hlbgpt("predict", *where, *greedy, "--data.prompts=Return the "))
    assert texts[0] == texts[1]
