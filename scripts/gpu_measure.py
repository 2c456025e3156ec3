"""Measure a device, or a network on it: a stage of scripts/gpu_report.py in its own process.

    python scripts/gpu_measure.py steps --out runs/steps -- --config configs/speedrun.yaml

Arguments after -- are those of `hlbgpt fit`. `gradients` and `steps` prepare its run, with text,
precision, shapes and compilation, measure it and end it before its first step. The result is
OUT/measured.json: tables by their captions.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import lightning as L
import torch
from gpu_gradients import BOUNDS, compare_evaluation, compare_gradients
from gpu_hardware import Row, Timeline, hardware_tables
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hlbgpt.cli.main import build, one_line_errors, run
from hlbgpt.data import TrainLoader
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.clock import synchronize
from hlbgpt.utils.command import command
from hlbgpt.utils.errors import require_positive
from hlbgpt.utils.files import write_json
from hlbgpt.utils.hardware import gpu_of, peak_memory

MEASURED = "measured.json"
PARTS = ("forward", "backward", "optimizer")  # of a step
_KERNELS = 15  # rows of a kernel table
_PROFILED_STEPS = 3

Tables = dict[str, list[Row]]


class BeforeFirstStep(L.Callback):
    """Measures a run that is compiled and ready to train, and ends it before its first step."""

    def __init__(self, measure: Callable[..., Tables], repeat: int) -> None:
        self.measure, self.repeat = measure, repeat
        self.found: Tables = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        if pl_module.net.needs_token_counts:
            counts = pl_module.train_loader.token_counts(pl_module.data.vocab_size)
            pl_module.net.init_from_token_counts(counts)
        self.found = self.measure(trainer, pl_module, self.repeat)
        trainer.should_stop = True


def description(trainer: L.Trainer, module: LanguageModule) -> str:
    """How the network runs, for captions."""
    return f"{trainer.precision}, {'compiled' if module.compile_net else 'NOT compiled'}"


def micro_batches(module: LanguageModule) -> list[Tensor]:
    """Random windows of the training split (B, T + 1) for each shape of the run's micro-batches."""
    data = module.data
    shapes = module.train_shapes or [(data.micro_batch_size, data.sequence_length)]
    loader = TrainLoader(data.files["train"].tokens, seed=0)
    windows = []
    for batch_size, length in shapes:
        loader.set_step(batch_size=batch_size, sequence_length=length)
        windows.append(next(iter(loader))[0].to(module.device))
    return windows


def gradients(trainer: L.Trainer, module: LanguageModule, repeat: int) -> Tables:
    """Gradients at each shape, and an evaluation, each compared once with float32."""
    context, how = trainer.precision_plugin.forward_context, description(trainer, module)
    with torch.no_grad():  # next to weights that are zero, gradients are zero
        for parameter in module.net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = next(iter(module.data.val_dataloader())).to(module.device)
    return {
        f"Training, {how}, one micro-batch of real tokens (n = 1) of each shape, noise on the "
        f"weights, float32 without `capacity`; {BOUNDS}": [
            compare_gradients(module.net, windows, context) for windows in micro_batches(module)
        ],
        f"Evaluation, {how}, n = 1": [compare_evaluation(module.net, batch, context)],
    }


def steps(trainer: L.Trainer, module: LanguageModule, repeat: int) -> Tables:
    """Times of a step of one micro-batch of each shape; kernels of the shortest and longest."""
    for group in trainer.optimizers[0].param_groups:
        group["lr"] = 0.0  # the same work, and weights that stay finite
    batches, how = micro_batches(module), description(trainer, module)
    times = [time_steps(trainer, module, batch, repeat) for batch in batches]
    found = {f"Steps of one micro-batch, {how}, medians of n = {repeat}": times}
    lengths = [batch.shape[1] for batch in batches]
    for i in sorted({lengths.index(min(lengths)), lengths.index(max(lengths))}):
        shape = " x ".join(map(str, times[i]["windows x tokens"]))
        caption = f"Kernels of a step of {shape}, {how}, means of n = {_PROFILED_STEPS}"
        found[caption] = kernels(trainer, module, batches[i], times[i]["step ms"])
    return found


def one_step(
    trainer: L.Trainer,
    module: LanguageModule,
    batch: Tensor,
    mark: Callable[[], None] = lambda: None,
) -> None:
    """An optimizer step of one micro-batch; calls `mark` before, between and after its parts."""
    mark()
    with trainer.precision_plugin.forward_context():
        loss = module.net(batch[:, :-1], batch[:, 1:])
    mark()
    loss.backward()
    mark()
    trainer.optimizers[0].step()
    trainer.optimizers[0].zero_grad()
    mark()


def time_steps(trainer: L.Trainer, module: LanguageModule, batch: Tensor, repeat: int) -> Row:
    """Medians over `repeat` steps, MFU and peak memory."""
    device, (rows, length) = module.device, (batch.shape[0], batch.shape[1] - 1)
    for _ in range(3):
        one_step(trainer, module, batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    timeline, host = Timeline(device), []
    for _ in range(repeat):
        start = time.perf_counter()
        one_step(trainer, module, batch, timeline.mark)
        host.append(1e3 * (time.perf_counter() - start))
    laps = timeline.milliseconds()  # every fourth lies between two steps
    parts = {f"{name} ms": laps[i::4] for i, name in enumerate(PARTS)}
    step = median(map(sum, zip(*parts.values(), strict=True)))
    flops, gpu = rows * length * module.net.flops_per_token(length), gpu_of(device)
    return {
        "windows x tokens": (rows, length),
        "step ms": step,
        **{name: median(values) for name, values in parts.items()},
        "host ms": median(host),
        "s for 1M tokens": 1e3 * step / (rows * length),
        "MFU": flops / (step / 1e3) / gpu.flops if gpu else None,
        "peak GB": (peak_memory(device) or 0) / 1e9,
    }


def kernels(trainer: L.Trainer, module: LanguageModule, batch: Tensor, step_ms: float) -> list[Row]:
    """All kernels of a step in a row, then the longest; operators on a CPU."""
    cuda, rows = module.device.type == "cuda", []
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(_PROFILED_STEPS):
            one_step(trainer, module, batch)
        synchronize(module.device)
    for event in profiler.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if spent > 0 and (event.device_type == DeviceType.CUDA) == cuda:
            rows.append((spent / 1e3 / _PROFILED_STEPS, event.count / _PROFILED_STEPS, event.key))
    total = sum(row[0] for row in rows), sum(row[1] for row in rows), "all"
    return [
        {"ms": ms, "share of the step": ms / step_ms, "calls": calls, "kernel": name[:100]}
        for ms, calls, name in [total, *sorted(rows, reverse=True)[:_KERNELS]]
    ]


def measure(stage: str, words: Sequence[str], out: Path, repeat: int) -> Tables:
    """The tables of a stage, for `hlbgpt fit` with these words."""
    if stage == "hardware":
        built = build(words, device="meta")
        device = "cpu" if built.config.trainer.accelerator == "cpu" else "cuda"
        return hardware_tables(built, torch.device(device), repeat)
    probe = BeforeFirstStep(gradients if stage == "gradients" else steps, repeat)
    own = ["--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    with one_line_errors():
        run(["fit", *words, *own, f"--trainer.default_root_dir={out}"], [probe])
    return probe.found


@command("gpu_measure.py")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one stage; returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("hardware", "gradients", "steps"))
    parser.add_argument("--out", type=Path, required=True, help="folder for the result")
    parser.add_argument("--repeat", type=int, default=20, help="n of the times (default: 20)")
    options = parser.parse_args(words[:split])
    require_positive("--", repeat=options.repeat)
    options.out.mkdir(parents=True, exist_ok=True)
    found = measure(options.stage, words[split + 1 :], options.out, options.repeat)
    write_json(options.out / MEASURED, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
