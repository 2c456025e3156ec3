"""The record of a run: its figures as JSON, as a table, and in the logs."""

import io
from typing import Any

import lightning as L
import torch
from rich import box
from rich.console import Console as Terminal
from rich.table import Table

from hlbgpt.callbacks.target import Milestone
from hlbgpt.callbacks.token_schedule import TokenSchedule
from hlbgpt.runs.folder import CONFIG, run_folder
from hlbgpt.runs.logger import RESULT
from hlbgpt.training.checks import callbacks_of
from hlbgpt.training.evaluation import part_of_split
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.git import git_revision
from hlbgpt.utils.hardware import device_name, driver_version, peak_memory
from hlbgpt.utils.seed import run_seed

BENCHMARK_WINDOW = 1024  # predicted tokens, or the network's context where that is shorter


def make_record(
    trainer: L.Trainer, module: LanguageModule, result: dict[str, Any], clocks: dict[str, float]
) -> dict[str, Any]:
    """What `record.json` holds: the result, tokens, clocks, and what they were measured on."""
    folder, device = run_folder(trainer), module.device
    config = folder / CONFIG if folder else None
    return {
        **result,
        "caveats": caveats(trainer, module, result["validation"]),
        "milestones": [c.figures() for c in callbacks_of(trainer) if isinstance(c, Milestone)],
        "step": trainer.global_step,
        "tokens": module.tokens_seen,
        "counted_tokens": module.net.counted_tokens,
        **clocks,
        **module.throughput.means(clocks["train_seconds"]),
        "texts": {"train": module.train_texts},
        "parameters": sum(parameter.numel() for parameter in module.net.parameters()),
        "seed": run_seed(),
        "precision": str(trainer.precision),
        "device": device_name(device),
        "driver": driver_version() if device.type == "cuda" else None,
        "devices": trainer.world_size,
        "step_tokens": module.step_tokens,
        "peak_memory_bytes": peak_memory(device),
        "torch": torch.__version__,
        "lightning": L.__version__,
        "git_revision": git_revision(),
        "config": str(config) if config and config.is_file() else None,
    }


def caveats(
    trainer: L.Trainer, module: LanguageModule, validation: dict[str, Any] | None
) -> list[str]:
    """What makes the result no record that others can be compared with; none for a whole run."""
    found, usual = [], min(BENCHMARK_WINDOW, module.net.max_sequence_length or BENCHMARK_WINDOW)
    if validation and not validation["complete"]:
        found.append(f"validated on {part_of_split(validation)}")
    if validation and (length := validation["sequence_length"]) != usual:
        found.append(f"validated in windows of {length} tokens instead of {usual}")
    if (texts := len(module.train_texts)) > 1:
        found.append(f"trained on {texts} texts, one after the other")
    for schedule in (c for c in callbacks_of(trainer) if isinstance(c, TokenSchedule)):
        found += schedule.other_sizes(trainer.world_size)
    return found


def summary(record: dict[str, Any]) -> str:
    """The result in a line, and the figures in a table."""
    value = "never validated" if record["value"] is None else f"{record['value']:.4f}"
    what = "target met" if record["reached"] else "target NOT met"
    verdict = (
        f"{what}: {record['monitor']} {value} (target {record['target']:g}) at step "
        f"{record['step']} after {record['tokens'] / 1e6:.2f}M tokens: "
        f"{record['train_seconds']:.1f} s of training"
    )
    if record["caveats"]:
        verdict += f"\nnot a record: {'; '.join(record['caveats'])}"
    table = Table(box=box.SIMPLE, show_header=False)
    for name, figure in _figures(record).items():
        table.add_row(name, figure)
    text = io.StringIO()
    Terminal(file=text, width=100, force_jupyter=False).print(table)
    return f"{verdict}\n{text.getvalue().rstrip()}"


def _figures(record: dict[str, Any]) -> dict[str, str]:
    rate = record["tokens"] / record["train_seconds"] if record["train_seconds"] else 0.0
    mfu = f", MFU {record['mfu']:.1%}" if record["mfu"] is not None else ""
    memory = record["peak_memory_bytes"]
    counted = record["counted_tokens"]
    return {
        **({"n-grams": f"of {counted:,} tokens (open track)"} if counted else {}),
        "training": f"{record['train_seconds']:.1f} s, of which {record['data_seconds']:.1f} s "
        "waiting for data",
        "compilation": f"{record['compile_seconds']:.1f} s",
        "validation": f"{record['validation_seconds']:.1f} s",
        "checkpoints": f"{record['checkpoint_seconds']:.1f} s",
        "in total": f"{record['wall_seconds']:.1f} s",
        "speed": f"{rate:,.0f} tokens/s{mfu}",
        "parameters": f"{record['parameters']:,}",
        "peak memory": "unknown" if memory is None else f"{memory / 1e9:.2f} GB",
        "device": f"{record['devices']} x {record['device']}, {record['precision']}",
    }


def log_record(trainer: L.Trainer, record: dict[str, Any]) -> None:
    """Log the figures to every logger as scalars of the last step."""
    figures = {
        f"{RESULT}/{name}": float(value)
        for name, value in record.items()
        if isinstance(value, (bool, int, float)) and name not in ("target", "seed", "devices")
    }
    for logger in trainer.loggers:
        logger.log_metrics(figures, step=record["step"] - 1)  # Lightning counts steps from 0
        logger.save()
