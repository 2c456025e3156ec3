"""The TensorBoard logger: scalars in groups, and losses by tokens and seconds of training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard import SummaryWriter

TOKENS, SECONDS = "tokens_seen", "train_seconds"
BY_TOKENS = "by_tokens"
# What TensorBoard shows side by side; other names stay as they are, `lr/...` is a group already.
_GROUPS = {
    "loss": ("train_loss", "val_loss", "test_loss"),
    "quality": tuple(
        f"{split}_{name}"
        for split in ("val", "test")
        for name in ("perplexity", "bits_per_byte", "accuracy")
    ),
    "schedule": ("sequence_length", "step_tokens", "micro_batches_per_step"),
    "speed": ("tokens_per_second", "mfu"),
    "progress": (TOKENS, SECONDS, "epoch"),
}
_TAGS = {name: f"{group}/{name}" for group, names in _GROUPS.items() for name in names} | {
    "grad_norm": "grad_norm/total"  # beside those of parameter groups
}


def tag(name: str) -> str:
    """The name under which TensorBoard has the metric `name`."""
    return _TAGS.get(name, name)


class CurveLogger(TensorBoardLogger):
    """Lightning's TensorBoard logger with names in groups, and two more axes for losses.

    Metrics keep their names for callbacks (`val_loss`); TensorBoard shows them as `loss/val_loss`.
    Losses that come with `tokens_seen` and `train_seconds` are written again to the sub-folder
    `by_tokens`, as `loss_by_tokens/...`: TensorBoard's axis "Step" is tokens there, and "Relative"
    is the run's own clock, seconds of training.
    """

    _by_tokens: SummaryWriter | None = None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        losses = [name for name in _GROUPS["loss"] if name in values]
        if losses and TOKENS in values:
            if self._by_tokens is None:
                self.cut_back(None)
            assert self._by_tokens is not None
            for name in losses:
                self._by_tokens.add_scalar(
                    f"loss_{BY_TOKENS}/{name}",
                    values[name],
                    global_step=int(values[TOKENS]),
                    walltime=values.get(SECONDS),
                )
        if "val_loss" in values:  # a place on the axes above, but no new point of its own curve
            values = {name: v for name, v in values.items() if name not in (TOKENS, SECONDS)}
        super().log_metrics({tag(name): value for name, value in values.items()}, step)

    @rank_zero_only
    def cut_back(self, tokens: int | None) -> None:
        """Let the curves by tokens go on before `tokens`, as `purge_step` does by steps."""
        self._by_tokens = SummaryWriter(str(Path(self.log_dir) / BY_TOKENS), purge_step=tokens)

    @rank_zero_only
    def save(self) -> None:
        super().save()
        if self._by_tokens is not None:
            self._by_tokens.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._by_tokens is not None:
            self._by_tokens.close()


def text_loggers(loggers: list[Any]) -> list[TensorBoardLogger]:
    """Those of `loggers` that can keep text."""
    return [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]
