"""The clock: stops training when the target is met, and records how long that took."""

import io
import json
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from rich import box
from rich.console import Console as Terminal
from rich.table import Table

from hlbgpt.callbacks.eta import seconds_to_target
from hlbgpt.data.loaders import TokenStream
from hlbgpt.runs.config import compared_settings
from hlbgpt.runs.folder import RECORD, run_folder
from hlbgpt.runs.logger import text_loggers
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.clock import Stopwatch, process_seconds, synchronize
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.machine import device_name, driver_version, git_revision, peak_memory
from hlbgpt.utils.seed import run_seed


class TimeToTarget(L.Callback):
    """Stops the run at the validation that meets the target, and records three clocks.

    - `train_seconds`, the headline: from before the first training step to the start of the
      validation that meets the target, without validations before that one.
      Of these, `data_seconds` went into making batches.
    - `compile_seconds`: compiling on dummy data before the first step. What compiles later, on
      real data, counts as training.
    - `wall_seconds`: from the start of the process to the target, everything included.

    The clocks go on where a checkpoint left them. The figures are printed, written to TensorBoard
    and to `record.json` in the run's folder; a run that ends without meeting the target says so.

    Args:
        monitor: Logged metric to watch.
        target: Value at which the run stops.
        mode: `min` if the metric is to fall to the target, `max` if it is to rise to it.
        verbose: Whether to print a line after each validation.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        target: float = 3.8,
        mode: Literal["min", "max"] = "min",
        verbose: bool = True,
    ) -> None:
        self.monitor, self.target, self.mode, self.verbose = monitor, target, mode, verbose
        self.train, self.validation = Stopwatch(), Stopwatch()
        self._data_before = self._compile_before = self._wall_before = 0.0
        self._streams: list[TokenStream] = []
        self._compiled = 0.0
        self._last_value: tuple[float, int] | None = None  # monitored value, and at which step
        self._values: list[tuple[float, float]] = []  # seconds of training, monitored value
        self._reached = False
        self._record: dict[str, Any] | None = None

    # --- the clocks ---------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        self._compiled = pl_module.compile_seconds
        loader = trainer.fit_loop._combined_loader
        assert loader is not None
        self._streams = [s for s in loader.flattened if isinstance(s, TokenStream)]
        pl_module.clock = self.train
        self._record = None
        if self._last_value and self._is_met(self._last_value[0]):
            self._reached = trainer.should_stop = True  # by the run that is resumed
            return
        synchronize(pl_module.device)
        self.train.start()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.train.running:
            synchronize(pl_module.device)
            self.train.stop()
            self.validation.start()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        if trainer.sanity_checking:
            self._value(trainer)  # a wrong name shows before training
        if not self.validation.running:
            return
        synchronize(pl_module.device)
        self.validation.stop()
        value = self._value(trainer)
        self._last_value = value, trainer.global_step
        self._values.append((self.train.seconds, value))
        self._reached = trainer.strategy.reduce_boolean_decision(self._is_met(value))
        if self._reached:
            trainer.should_stop = True
            self._publish(trainer, pl_module)
            return
        if self.verbose:
            line = (
                f"step {trainer.global_step:>6}  {in_millions(pl_module.tokens_seen)} tokens  "
                f"{self.monitor} {value:.4f}  {self.train.seconds:.1f} s  {self.outlook(trainer)}"
            )
            pl_module.print(line.rstrip())
        self.train.start()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        synchronize(pl_module.device)
        self.train.stop()
        if self._record is None:
            self._publish(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the record, last of all: a folder without one holds a run to be gone on with."""
        assert isinstance(pl_module, LanguageModule)
        if self._record is None:  # resumed with nothing left to do
            self._publish(trainer, pl_module)
        folder = run_folder(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / RECORD
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._record, indent=2) + "\n")
        temporary.replace(path)

    def _is_met(self, value: float) -> bool:
        return value <= self.target if self.mode == "min" else value >= self.target

    def _value(self, trainer: L.Trainer) -> float:
        if self.monitor not in trainer.callback_metrics:
            raise InputError(
                f"time_to_target.monitor: no metric {self.monitor!r} is logged; choose one of "
                + ", ".join(sorted(trainer.callback_metrics))
            )
        return float(trainer.callback_metrics[self.monitor])

    def clocks(self) -> dict[str, float]:
        """All clocks in seconds, those of earlier processes of the run included."""
        return {
            "train_seconds": self.train.seconds,
            "data_seconds": self._data_before + self._data_wait(),
            "validation_seconds": self.validation.seconds,
            "compile_seconds": self._compile_before + self._compiled,
            "wall_seconds": self._wall_before + process_seconds(),
        }

    def _data_wait(self) -> float:
        return sum(stream.wait.seconds for stream in self._streams)

    def state_dict(self) -> dict[str, Any]:
        return {**self.clocks(), "last_value": self._last_value, "values": self._values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train = Stopwatch(state_dict["train_seconds"])
        self.validation = Stopwatch(state_dict["validation_seconds"])
        self._data_before = state_dict["data_seconds"]
        self._compile_before = state_dict["compile_seconds"]
        self._wall_before = state_dict["wall_seconds"]
        self._last_value = state_dict["last_value"]
        self._values = state_dict.get("values", [])

    def outlook(self, trainer: L.Trainer) -> str:
        """In words, when the target is to be expected, from the validations so far."""
        now, plan = self.train.seconds, trainer.max_steps
        left = seconds_to_target(self._values, self.target)
        left = None if left is None else max(0.0, left - (now - self._values[-1][0]))
        if trainer.global_step == plan:
            return ""
        if plan > 0 and trainer.global_step:
            end = now / trainer.global_step * (plan - trainer.global_step)
            if left is None or left > end:
                return f"ends in about {_duration(end)}"
        return "" if left is None else f"target in about {_duration(left)}"

    # --- the record ---------------------------------------------------------------------------

    def record(self, trainer: L.Trainer, pl_module: LanguageModule) -> dict[str, Any]:
        """The figures as they stand; `value` is the last one monitored, at `value_step`."""
        value, value_step = self._last_value or (None, None)
        folder = run_folder(trainer)
        config = folder / "config.yaml" if folder else None
        device = pl_module.device
        return {
            "reached": self._reached,
            "monitor": self.monitor,
            "target": self.target,
            "value": value,
            "value_step": value_step,
            "step": trainer.global_step,
            "tokens": pl_module.tokens_seen,
            **self.clocks(),
            **pl_module.throughput.figures(self.train.seconds),
            "parameters": sum(p.numel() for p in pl_module.net.parameters()),
            "seed": run_seed(),
            "precision": str(trainer.precision),
            "device": device_name(device),
            "driver": driver_version() if device.type == "cuda" else None,
            "devices": trainer.world_size,
            "peak_memory_bytes": peak_memory(device),
            "torch": torch.__version__,
            "lightning": L.__version__,
            "git_revision": git_revision(),
            "config": str(config) if config and config.is_file() else None,
        }

    def _publish(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        """Make the record; print and log it."""
        self._record = self.record(trainer, pl_module)
        pl_module.print(_summary(self._record))
        if run_folder(trainer) is not None and trainer.is_global_zero:
            _log_figures(trainer, self._record)


def _summary(record: dict[str, Any]) -> str:
    """The verdict in a line, and the figures in a table."""
    value = "never validated" if record["value"] is None else f"{record['value']:.4f}"
    what = "target met" if record["reached"] else "target NOT met"
    verdict = (
        f"{what}: {record['monitor']} {value} (target {record['target']:g}) at step "
        f"{record['step']} after {in_millions(record['tokens'])} tokens: "
        f"{record['train_seconds']:.1f} s of training"
    )
    table = Table(box=box.SIMPLE, show_header=False)
    for name, figure in _figures(record).items():
        table.add_row(name, figure)
    shown = io.StringIO()
    Terminal(file=shown, width=100).print(table)
    return f"{verdict}\n{shown.getvalue().rstrip()}"


def _figures(record: dict[str, Any]) -> dict[str, str]:
    rate = record["tokens"] / record["train_seconds"] if record["train_seconds"] else 0.0
    mfu = f", MFU {record['mfu']:.1%}" if record["mfu"] is not None else ""
    waited = f"{record['data_seconds']:.1f} s of it waiting for data"
    return {
        "training": f"{record['train_seconds']:.1f} s, {waited}",
        "compilation": f"{record['compile_seconds']:.1f} s",
        "validation": f"{record['validation_seconds']:.1f} s",
        "in all": f"{record['wall_seconds']:.1f} s",
        "speed": f"{rate:,.0f} tokens/s{mfu}",
        "parameters": f"{record['parameters']:,}",
        "peak memory": f"{record['peak_memory_bytes'] / 1e9:.2f} GB",
        "device": f"{record['devices']} x {record['device']}, {record['precision']}",
    }


def in_millions(tokens: int) -> str:
    """As runs are spoken of: 0.82M."""
    return f"{tokens / 1e6:.2f}M"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@rank_zero_only
def _log_figures(trainer: L.Trainer, record: dict[str, Any]) -> None:
    """The figures as scalars, and with the run's settings in the HParams tab."""
    first = {name: record[name] for name in ("train_seconds", "value", "tokens")}  # to sort by
    figures = {
        f"time_to_target/{name}": float(value)
        for name, value in {**first, **record}.items()
        if isinstance(value, (bool, int, float)) and name not in ("target", "seed", "devices")
    }
    settings: dict[str, Any] = {name: record[name] for name in ("precision", "device")}
    if record["config"]:
        settings |= compared_settings(Path(record["config"]).read_text(encoding="utf-8"))
    settings["seed"] = record["seed"]
    for logger in (with_text := text_loggers(trainer.loggers)):
        logger.log_hyperparams(settings, metrics=figures, step=record["step"])
        logger.save()
    for other in trainer.loggers:
        if other not in with_text:
            other.log_metrics(figures, step=record["step"])
