"""Find training runs on disk and read their curves, for scripts/plot.py."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import ScalarEvent

from hlbgpt.runs.config import flat_settings, load_yaml
from hlbgpt.runs.folder import CONFIG, RECORD
from hlbgpt.runs.logger import scalars, tag, tag_by_tokens
from hlbgpt.runs.record import read_record
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.schema import NUMBER

TOKENS, STEPS, SECONDS = AXES = ("million tokens", "steps", "seconds of training")
EVENTS = "events.out.tfevents.*"
TARGET = "time_to_target.init_args"
# Settings that may differ between runs of one experiment: the seed, and where files are.
NOT_COMPARED = re.compile(
    r"seed_everything|ckpt_path|data\.cache_dir|trainer\.(default_root_dir|logger)(\..*)?"
)


class Curve(NamedTuple):
    """Points of a curve in the order of `x`; both arrays are (n,)."""

    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class RunCurves:
    """What one run left in its folder."""

    folder: Path
    name: str  # of the config, or of the config and variant in a benchmark
    settings: dict[str, Any]  # the run's config.yaml with dotted keys
    record: dict[str, Any]  # the run's record.json; empty while the run is unfinished
    losses: dict[str, Curve]  # validation loss by each of `AXES`
    rates: dict[str, Curve]  # learning rate by steps for each parameter group

    @property
    def seed(self) -> int | None:
        """The random seed; None if the run had none, or is unfinished and drew one."""
        if self.record:
            return self.record["seed"]
        seed = self.settings.get("seed_everything")
        return seed if type(seed) is int else None

    @property
    def target(self) -> float | None:
        """The target of the validation loss; None if infinite or of another metric."""
        target = self.settings.get(f"{TARGET}.target")
        by_loss = self.settings.get(f"{TARGET}.monitor", "val_loss") == "val_loss"
        return target if by_loss and NUMBER.accepts(target) else None

    @property
    def is_drawable(self) -> bool:
        """Whether it has validated, with a loss that is finite."""
        return all(np.isfinite(self.losses[axis].y).any() for axis in AXES)


def find_runs(arguments: Sequence[str]) -> list[RunCurves]:
    """Read all runs in folders given as FOLDER or NAME=FOLDER; raises InputError without a run."""
    names: dict[Path, str] = {}
    for argument in arguments:
        try:
            name, folders = _find_folders(argument)
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            raise InputError(f"{argument[:100]}: cannot be read: {error}") from error
        if not folders:
            raise InputError(
                f"{argument}: contains no run; name a folder with {CONFIG} and {EVENTS} in it, "
                "such as runs/quickstart/version_0, or one above it"
            )
        names |= {folder: name for folder in folders if folder not in names}
    return [read_run(folder, name) for folder, name in names.items()]


def _find_folders(argument: str) -> tuple[str, list[Path]]:
    """The name given to runs, which may be empty, and their folders."""
    named = not Path(argument).is_dir()  # a folder's name may contain "="
    name, _, path = argument.rpartition("=") if named else ("", "", argument)
    configs = sorted(Path(path).resolve().rglob(CONFIG)) if path else []
    return name, [config.parent for config in configs if any(config.parent.glob(EVENTS))]


def read_run(folder: Path, name: str = "") -> RunCurves:
    """Read the run in `folder`; raises InputError if a file of it is broken."""
    try:
        by_step = scalars(folder)
    except (OSError, ValueError) as error:  # ValueError: a path that is not UTF-8
        raise InputError(f"{folder}: its curves cannot be read: {error}") from error
    loss = by_step.get(tag_by_tokens("val_loss"), [])
    return RunCurves(
        folder=folder,
        name=name or _default_name(folder),
        settings=read_settings(folder / CONFIG),
        record=read_record(folder) if (folder / RECORD).is_file() else {},
        losses={
            TOKENS: _curve(loss, scale=1e-6),  # its `step` counts tokens
            STEPS: _curve(by_step.get(tag("val_loss"), [])),
            SECONDS: _curve(loss, "wall_time"),
        },
        rates={key: _curve(by_step[key]) for key in by_step if key.startswith("lr/")},
    )


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a run's config.yaml by dotted keys; raises InputError if it is broken."""
    try:
        config = load_yaml(path.read_bytes().decode(), "YAML")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: cannot be read: {reason}; restore it") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds {config!r:.50}, so it is no config of a run; restore it")
    settings = flat_settings(config)
    target = settings.get(f"{TARGET}.target")
    if target is not None and type(target) not in (int, float):
        raise InputError(f"{path}: {TARGET}.target: {target!r:.50} is not a number; restore it")
    return settings


def _curve(events: Sequence[ScalarEvent], x: str = "step", scale: float = 1.0) -> Curve:
    points = sorted((getattr(event, x) * scale, event.value) for event in events)
    return Curve(*np.array(points, dtype=float).reshape(-1, 2).T)


def _default_name(folder: Path) -> str:
    """Config of runs/CONFIG/version_N; config and variant of OUT/CONFIG/VARIANT/seed_N."""
    if re.fullmatch(r"seed_\d+", folder.name):
        return f"{folder.parents[1].name}, {folder.parent.name.replace('_', ' ')}"
    return folder.parent.name if re.fullmatch(r"version_\d+", folder.name) else folder.name


def group_by_variant(runs: Sequence[RunCurves]) -> dict[str, list[RunCurves]]:
    """Group finished runs that differ in the random seed only; returns the groups by label.

    An unfinished run is a group of its own, because a mean must not include a part of a run. So is
    a second run with the same seed, because it is no other sample.
    """
    groups: dict[tuple[Any, ...], list[RunCurves]] = {}
    seen: Counter[tuple[Any, ...]] = Counter()
    for run in runs:
        compared = {key: v for key, v in run.settings.items() if not NOT_COMPARED.fullmatch(key)}
        key = (run.name, repr(sorted(compared.items())), "" if run.record else run.folder)
        if run.seed is not None:  # runs without a seed are samples of their own
            seen[key, run.seed] += 1
        groups.setdefault((*key, max(1, seen[key, run.seed])), []).append(run)
    labels = [name if done == "" else f"{name}, unfinished" for name, _, done, _ in groups]
    return {
        label if labels.count(label) == 1 else f"{label} ({group[0].folder})": group
        for label, group in zip(labels, groups.values(), strict=True)
    }


def band(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, mean, minimum and maximum of `curves` over the range that all of them cover.

    The curves are interpolated linearly at every x that occurs in one of them.
    """
    low, high = max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves)
    x = np.unique(np.concatenate([curve.x for curve in curves]))
    x = x[(x >= low) & (x <= high)]
    y = np.stack([np.interp(x, *curve) for curve in curves])
    return x, y.mean(0), y.min(0), y.max(0)
