"""Find training runs on disk and read their curves, for scripts/plot.py."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent

from hlbgpt.runs.config import flat_settings
from hlbgpt.runs.folder import CONFIG, RECORD
from hlbgpt.runs.logger import BY_TOKENS, tag
from hlbgpt.utils.errors import InputError

TOKENS, STEPS, SECONDS = AXES = ("million tokens", "steps", "seconds of training")
EVENTS = "events.out.tfevents.*"
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
    """What one run left in its folder.

    Attributes:
        folder: The run's folder.
        name: Name of the config, or of the config and variant in a benchmark.
        settings: The run's config.yaml with dotted keys; empty if there is no such file.
        record: The run's record.json; empty while the run is unfinished.
        losses: Validation loss by each of `AXES`.
        rates: Learning rate by steps for each parameter group.
    """

    folder: Path
    name: str
    settings: dict[str, Any]
    record: dict[str, Any]
    losses: dict[str, Curve]
    rates: dict[str, Curve]

    @property
    def seed(self) -> Any:
        return self.record.get("seed", self.settings.get("seed_everything"))

    @property
    def target(self) -> float | None:
        """The target of the validation loss; None if another metric is monitored."""
        monitor = self.settings.get("time_to_target.monitor", "val_loss")
        return self.settings.get("time_to_target.target") if monitor == "val_loss" else None

    def differs_in_seed_only(self, other: "RunCurves") -> bool:
        """Whether both runs are complete samples of one experiment with different seeds."""
        first, second = (
            {key: run.settings[key] for key in run.settings if not NOT_COMPARED.fullmatch(key)}
            for run in (self, other)
        )
        finished = bool(self.record and other.record)
        return finished and (self.name, first) == (other.name, second) and self.seed != other.seed


def find_runs(arguments: Sequence[str]) -> list[RunCurves]:
    """Read all runs in the folders that are named, each as FOLDER or NAME=FOLDER.

    Raises:
        InputError: if a folder is missing or contains no run, or if a run's file is broken.
    """
    runs: dict[Path, RunCurves] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or Path(argument).exists():
            name, path = "", argument
        if not Path(path).is_dir():
            raise InputError(f"{argument}: no such folder; name a run's folder, or one above it")
        folders = sorted(_run_folders(Path(path)))
        if not folders:
            raise InputError(
                f"{argument}: contains no run; name a folder with {CONFIG} and {EVENTS} in it, "
                "such as runs/quickstart/version_0, or one above it"
            )
        for folder in folders:
            if folder.resolve() not in runs:
                runs[folder.resolve()] = read_run(folder, name)
    return list(runs.values())


def _run_folders(folder: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        if CONFIG in files and any(Path(path).glob(EVENTS)):
            folders.clear()  # a run contains no other run
            yield Path(path)


def read_run(folder: Path, name: str = "") -> RunCurves:
    """Read the run in `folder`; raises InputError if one of its files is broken."""
    by_step = scalars(folder)
    by_tokens = scalars(folder / BY_TOKENS) if (folder / BY_TOKENS).is_dir() else {}
    loss = by_tokens.get(f"loss_{BY_TOKENS}/val_loss", [])  # its `step` counts tokens
    return RunCurves(
        folder=folder,
        name=name or _default_name(folder.absolute()),
        settings=flat_settings(_read(folder / CONFIG)),
        record=_read(folder / RECORD),
        losses={
            TOKENS: _curve(loss, scale=1e-6),
            STEPS: _curve(by_step.get(tag("val_loss"), [])),
            SECONDS: _curve(loss, "wall_time"),
        },
        rates={key: _curve(by_step[key]) for key in by_step if key.startswith("lr/")},
    )


def scalars(folder: Path) -> dict[str, list[ScalarEvent]]:
    """Every TensorBoard curve in `folder`, without steps that a resumed run repeated."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: events.Scalars(name) for name in events.Tags()["scalars"]}


def _curve(events: Sequence[ScalarEvent], x: str = "step", scale: float = 1.0) -> Curve:
    points = sorted((getattr(event, x) * scale, event.value) for event in events)
    return Curve(*np.array(points, dtype=float).reshape(-1, 2).T)


def _read(path: Path) -> dict[str, Any]:
    """A mapping from a YAML or JSON file; empty if there is no such file."""
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
        return dict(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise InputError(f"{path}: no valid {path.suffix[1:].upper()}; remove this run") from error


def _default_name(folder: Path) -> str:
    """Config of runs/CONFIG/version_N; config and variant of OUT/CONFIG/VARIANT/seed_N."""
    if re.fullmatch(r"seed_\d+", folder.name):
        variant, config = folder.parents[0].name, folder.parents[1].name
        return config if variant == "as_is" else f"{config}, {variant.replace('_', ' ')}"
    return folder.parent.name if re.fullmatch(r"version_\d+", folder.name) else folder.name


def group_by_variant(runs: Sequence[RunCurves]) -> dict[str, list[RunCurves]]:
    """Group finished runs that differ in the random seed only; returns the groups by label.

    An unfinished run is a group of its own, because a mean must not include a part of a run.
    """
    groups: list[list[RunCurves]] = []
    for run in runs:
        for group in groups:
            if all(run.differs_in_seed_only(other) for other in group):
                group.append(run)
                break
        else:
            groups.append([run])
    names = [group[0].name + ("" if group[0].record else ", unfinished") for group in groups]
    return {
        name if names.count(name) == 1 else f"{name} ({group[0].folder})": group
        for name, group in zip(names, groups, strict=True)
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
