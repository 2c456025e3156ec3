"""The TensorBoard logger: metrics in groups, and losses by tokens and by training time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard import SummaryWriter

TOKENS, SECONDS = "tokens_seen", "train_seconds"
BY_TOKENS = "by_tokens"
_LOSSES = ("train_loss", "val_loss", "test_loss")
_QUALITY = ("perplexity", "bits_per_byte", "accuracy")
# The groups in which TensorBoard shows metrics; other names are not changed.
_GROUPS = {
    "loss": _LOSSES,
    "quality": tuple(f"{split}_{name}" for split in ("val", "test") for name in _QUALITY),
    "schedule": ("sequence_length", "step_tokens", "micro_batches_per_step"),
    "speed": ("tokens_per_second", "mfu"),
    "progress": (TOKENS, SECONDS, "epoch"),
}
_TAGS = {name: f"{group}/{name}" for group, names in _GROUPS.items() for name in names} | {
    "grad_norm": "grad_norm/total"  # beside the norms of parameter groups
}


def tag(name: str) -> str:
    """TensorBoard's tag for a metric: `loss/val_loss` for `val_loss`."""
    return _TAGS.get(name, name)


class RunLogger(TensorBoardLogger):
    """Lightning's TensorBoard logger with metrics in groups and with losses by tokens.

    Losses that are logged together with `tokens_seen` are written a second time, to the sub-folder
    `by_tokens` as `loss_by_tokens/...`. There TensorBoard's axis "Step" shows tokens, and
    "Relative" shows `train_seconds`, the run's training time.
    """

    _by_tokens: SummaryWriter | None = None

    def __init__(self) -> None:
        super().__init__("runs", name="", version="", default_hp_metric=False)

    def open_in(self, folder: Path, step: int = 0, tokens: int = 0) -> None:
        """Write to the run's folder, and hide what was logged there after `step`."""
        self._root_dir, self._kwargs["purge_step"] = str(folder), step

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log scalars by step, and the losses among them also by tokens."""
        values = {name: float(value) for name, value in metrics.items()}
        losses = {name: values[name] for name in _LOSSES if name in values}
        if losses and TOKENS in values:
            tokens, seconds = int(values[TOKENS]), values.get(SECONDS)
            if self._by_tokens is None:
                # Hides what a run that is resumed had logged from here on.
                path = str(Path(self.log_dir) / BY_TOKENS)
                self._by_tokens = SummaryWriter(path, purge_step=tokens)
            for name, loss in losses.items():
                self._by_tokens.add_scalar(
                    f"loss_{BY_TOKENS}/{name}", loss, tokens, walltime=seconds
                )
        if "val_loss" in values:  # the training step has logged its progress already
            values = {name: v for name, v in values.items() if name not in (TOKENS, SECONDS)}
        super().log_metrics({tag(name): value for name, value in values.items()}, step)

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged to the disk."""
        super().save()
        if self._by_tokens is not None:
            self._by_tokens.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what was logged to the disk and close the files."""
        super().finalize(status)
        if self._by_tokens is not None:
            self._by_tokens.close()


def tensorboard_loggers(loggers: list[Any]) -> list[TensorBoardLogger]:
    """The TensorBoard loggers among `loggers`, which can log text."""
    return [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]
