"""The TensorBoard logger: metrics in groups, losses by tokens, and settings to compare runs by."""

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter, summary

from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import atomic_write

TOKENS, SECONDS = "tokens_seen", "train_seconds"
RESULT = "time_to_target"  # prefix of the figures of a run's record
_LOSSES = ("train_loss", "val_loss", "test_loss")
_QUALITY = ("perplexity", "bits_per_byte", "accuracy")
# The groups in which TensorBoard shows metrics; other names are not changed. It sorts them by name
# and opens the first two.
_GROUPS = {
    "loss": _LOSSES,
    "quality": tuple(f"{split}_{name}" for split in ("val", "test") for name in _QUALITY),
    "schedule": ("sequence_length", "step_tokens", "micro_batches_per_step"),
    "speed": ("tokens_per_second", "mfu"),
    "progress": (TOKENS, SECONDS, "epoch"),
}
# The tab HParams shows the first five metrics by name. There "-" sorts before "/", so these come
# before the losses, while elsewhere TensorBoard sorts by groups, and "loss" comes first.
HEADLINE = "loss-and-time"
_HEADLINE = {
    f"{RESULT}/{name}": f"{HEADLINE}/{name}"
    for name in ("reached", "tokens", "train_seconds", "value", "wall_seconds")
}
_TAGS = {name: f"{group}/{name}" for group, names in _GROUPS.items() for name in names} | _HEADLINE
_NORMS = {"grad_norm": "weight_gradient_norm", "update_norm": "weight_update_norm"}  # come last
_LAYOUT = {
    "loss": {
        "train and validation loss by step": ["Multiline", ["loss/(train|val)_loss$"]],
        "train and validation loss by tokens": ["Multiline", ["loss/(train|val)_loss_by_tokens$"]],
    },
    "learning rate": {"learning rate by parameter group": ["Multiline", ["lr/"]]},
    "norms": {
        f"norm of {what} by parameter group": ["Multiline", [f"{group}/"]]
        for what, group in zip(("gradient", "update"), _NORMS.values(), strict=True)
    },
}


def tag(name: str) -> str:
    """TensorBoard's tag for a metric: `loss/val_loss` for `val_loss`."""
    group, _, rest = name.partition("/")
    if group in _NORMS:
        return f"{_NORMS[group]}/{rest or 'total'}"
    return _TAGS.get(name, name)


def tag_by_tokens(name: str) -> str:
    """The tag of a loss whose "steps" are tokens and whose times are seconds of training."""
    return f"{tag(name)}_by_tokens"


class RunLogger(TensorBoardLogger):
    """Lightning's TensorBoard logger with metrics in groups and with losses by tokens.

    Losses that are logged together with `tokens_seen` are written a second time, as
    `loss/..._by_tokens`. There TensorBoard's axis "Step" shows tokens, and "Relative" shows
    `train_seconds`, the run's training time.

    Lightning counts steps from 0. TensorBoard shows the number of steps made, as the console does.

    The logger writes into the folder of its run, which `hlbgpt fit` names by `open_in`.

    Args:
        flush_secs: Seconds after which TensorBoard sees what was logged, at the latest.
    """

    def __init__(self, flush_secs: int = 10) -> None:
        self.flush_secs = flush_secs
        self._folder: Path | None = None
        self._step = self._tokens = 0
        self._writer: SummaryWriter | None = None
        self._settings_logged = False
        super().__init__("", name="", version="")

    def open_in(self, folder: Path, step: int = 0, tokens: int = 0) -> None:
        """Log into `folder` from now on, continuing a run that has made `step` steps, if any.

        What was logged there beyond `step` and `tokens` is hidden: a run that resumes from a
        checkpoint makes these steps again. A new run hides all that an earlier one left.
        """
        self._folder, self._step, self._tokens = folder, step, tokens
        super().__init__(
            folder,
            name="",
            version="",
            default_hp_metric=False,  # settings are collected in `hparams`, and written below
            purge_step=None if step else 0,
            flush_secs=self.flush_secs,
        )

    @property
    def log_dir(self) -> str:
        """The run's folder; empty before `open_in`."""
        return "" if self._folder is None else str(self._folder)

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """TensorBoard's writer, made when it is first asked for; raises InputError if not open."""
        if self._folder is None:
            raise InputError("RunLogger: no folder to log into; call `open_in(folder)` first")
        if self._writer is None:
            if self._step:
                _hide_later(self._folder, self._step, self._tokens)
            self._writer = super().experiment
            self._writer.add_custom_scalars(_LAYOUT)
            self._writer.flush()
        return self._writer

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log scalars by step, counted from 0, and the losses among them also by tokens."""
        writer, values = self.experiment, dict(metrics)
        self._log_settings()
        if TOKENS in values:
            tokens, seconds = int(values[TOKENS]), values.get(SECONDS)
            for name in _LOSSES:
                if name in values:
                    writer.add_scalar(tag_by_tokens(name), values[name], tokens, seconds)
        if "val_loss" in values:  # the training step has logged its progress already
            values = {name: v for name, v in values.items() if name not in (TOKENS, SECONDS)}
        made = None if step is None else step + 1
        super().log_metrics({tag(name): value for name, value in values.items()}, made)

    def _log_settings(self) -> None:
        """Write what `log_hyperparams` has collected, once: TensorBoard keeps the first only.

        Without the list of settings and metrics that torch's `add_hparams` writes: only then does
        TensorBoard compare the runs, and show first the settings in which they differ.
        """
        if self.hparams and not self._settings_logged:
            self._settings_logged = True
            settings = {
                name: value if isinstance(value, (bool, int, float)) else str(value)
                for name, value in dict(self.hparams).items()
            }
            _, session_start, _ = summary.hparams(settings, {})
            self.experiment.file_writer.add_summary(session_start)

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged to the disk."""
        if self._writer is not None:
            self._writer.flush()


def _hide_later(folder: Path, step: int, tokens: int) -> None:
    """Hide what was logged in `folder` after a step, in an event file that follows the others.

    TensorBoard hides all points from a step on. Losses by tokens go with them, because their
    "steps" are tokens, so the earlier ones are written again: in one file with the word to hide,
    at once, or a process killed meanwhile would lose some.
    """
    earlier = scalars(folder)
    events = [Event(file_version="brain.Event:2"), Event(step=step + 1)]
    events[1].session_log.status = SessionLog.START
    for name in map(tag_by_tokens, _LOSSES):
        for point in earlier.get(name, []):
            if point.step <= tokens:
                value = summary.scalar(name, point.value)
                events.append(Event(step=point.step, wall_time=point.wall_time, summary=value))
    if files := sorted(folder.glob("events.out.tfevents.*")):
        with atomic_write(Path(f"{files[-1]}.resumed")) as temporary, temporary.open("wb") as file:
            writer = RecordWriter(file)
            for event in events:
                writer.write(event.SerializeToString())


def scalars(folder: Path) -> dict[str, list[ScalarEvent]]:
    """Every TensorBoard curve in `folder`, without steps that a resumed run repeated."""
    if not folder.is_dir():
        return {}
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of what was repeated
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: events.Scalars(name) for name in events.Tags()["scalars"]}


def tensorboard_loggers(loggers: list[Any]) -> list[TensorBoardLogger]:
    """The TensorBoard loggers among `loggers`, which can log text."""
    return [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]


@contextlib.contextmanager
def quiet_writers() -> Iterator[None]:
    """Print no traceback of a thread in which TensorBoard writes: the run's next write raises it.

    The disk may be full, for example.
    """
    show = threading.excepthook

    def show_others(arguments: threading.ExceptHookArgs) -> None:
        if type(arguments.thread).__module__ != event_file_writer.__name__:
            show(arguments)

    threading.excepthook = show_others
    try:
        yield
    finally:
        threading.excepthook = show
