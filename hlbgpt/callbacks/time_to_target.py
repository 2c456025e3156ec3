"""The clock: stops training when the target is met, and records how long that took."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from hlbgpt.clock import Stopwatch, process_seconds, synchronize
from hlbgpt.errors import InputError
from hlbgpt.folders import run_folder
from hlbgpt.module import LanguageModule
from hlbgpt.seeds import run_seed


class TimeToTarget(L.Callback):
    """Stops the run at the validation that meets the target, and records three clocks.

    - `train_seconds`, the headline: from before the first training step to the start of the
      validation that meets the target, without validations before that one.
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
        self._compile_before = self._wall_before = 0.0
        self._compiled = 0.0
        self._values: list[tuple[float, int]] = []  # monitored value and step, at each validation
        self._reached = False

    # --- the clocks ---------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        self._compiled = pl_module.compile_seconds
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
        self._values.append((value, trainer.global_step))
        met = value <= self.target if self.mode == "min" else value >= self.target
        self._reached = trainer.strategy.reduce_boolean_decision(met)
        if self._reached:
            trainer.should_stop = True
            self._publish(trainer, pl_module)
            return
        if self.verbose:
            pl_module.print(
                f"step {trainer.global_step:>6}  {_millions(pl_module.tokens_seen)} tokens  "
                f"{self.monitor} {value:.4f}  {self.train.seconds:.1f} s"
            )
        self.train.start()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        synchronize(pl_module.device)
        self.train.stop()
        if not self._reached:
            self._publish(trainer, pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        # Stopped by hand: what was measured so far is still worth having.
        if isinstance(exception, KeyboardInterrupt) and self.train.seconds > 0:
            self.on_train_end(trainer, pl_module)

    def _value(self, trainer: L.Trainer) -> float:
        if self.monitor not in trainer.callback_metrics:
            raise InputError(
                f"time_to_target.monitor: no metric {self.monitor!r} is logged; choose one of "
                + ", ".join(sorted(trainer.callback_metrics))
            )
        return float(trainer.callback_metrics[self.monitor])

    def state_dict(self) -> dict[str, Any]:
        return {
            "train_seconds": self.train.seconds,
            "validation_seconds": self.validation.seconds,
            "compile_seconds": self._compile_before + self._compiled,
            "wall_seconds": self._wall_before + process_seconds(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train = Stopwatch(state_dict["train_seconds"])
        self.validation = Stopwatch(state_dict["validation_seconds"])
        self._compile_before = state_dict["compile_seconds"]
        self._wall_before = state_dict["wall_seconds"]

    # --- the record ---------------------------------------------------------------------------

    def record(self, trainer: L.Trainer, pl_module: LanguageModule) -> dict[str, Any]:
        """The figures as they stand; `value` is the last one monitored, at `value_step`."""
        value, value_step = self._values[-1] if self._values else (None, None)
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
            **self.state_dict(),
            "parameters": sum(p.numel() for p in pl_module.net.parameters()),
            "seed": run_seed(),
            "precision": str(trainer.precision),
            "device": _device_name(device),
            "devices": trainer.world_size,
            "peak_memory_bytes": _peak_memory(device),
            "torch": torch.__version__,
            "lightning": L.__version__,
            "git_revision": _git_revision(),
            "config": str(config) if config and config.is_file() else None,
        }

    def _publish(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        """Print, log and write the record."""
        record = self.record(trainer, pl_module)
        pl_module.print(_summary(record))
        folder = run_folder(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        _log_figures(trainer, record)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "record.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        temporary.replace(path)


def _summary(record: dict[str, Any]) -> str:
    """The record in a line."""
    value = "never validated" if record["value"] is None else f"{record['value']:.4f}"
    what = "target met" if record["reached"] else "target NOT met"
    return (
        f"{what}: {record['monitor']} {value} (target {record['target']:g}) at step "
        f"{record['step']} after {_millions(record['tokens'])} tokens: "
        f"{record['train_seconds']:.1f} s of training, {record['compile_seconds']:.1f} s of "
        f"compilation, {record['validation_seconds']:.1f} s of validation, "
        f"{record['wall_seconds']:.1f} s in all"
    )


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:.2f}M"


@rank_zero_only
def _log_figures(trainer: L.Trainer, record: dict[str, Any]) -> None:
    """The figures as scalars, and with the run's settings in the HParams tab."""
    figures = {
        f"time_to_target/{name}": float(value)
        for name, value in record.items()
        if isinstance(value, (bool, int, float)) and name not in ("target", "seed", "devices")
    }
    settings = {name: record[name] for name in ("seed", "precision", "device", "target")}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(settings, metrics=figures, step=record["step"])
            logger.save()
        else:
            logger.log_metrics(figures, step=record["step"])


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)


def _peak_memory(device: torch.device) -> int | None:
    """Bytes: of the GPU's allocator, or on a CPU of the process; None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "cpu" and os.name == "posix":
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return None


def _git_revision() -> str | None:
    """The commit of this code, with `-dirty` if files differ; None outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True)
        except FileNotFoundError:  # no git on this machine
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside somebody else's checkout: is this file one of its own?
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
