"""The runs that scripts/plot.py draws: found, read, put into groups, and averaged over seeds."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from benchmark_jobs import name_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent

from hlbgpt.runs.config import flat_settings
from hlbgpt.runs.folder import CONFIG, RECORD
from hlbgpt.runs.logger import BY_TOKENS, tag
from hlbgpt.runs.logger import TOKENS as TOKENS_SEEN
from hlbgpt.utils.errors import InputError

EVENTS = "events.out.tfevents.*"
LOSSES = ("val_loss", "train_loss")
TOKENS, STEPS, SECONDS = AXES = ("tokens", "steps", "seconds")
STEP_TOKENS, SEQUENCE_LENGTH = tag("step_tokens"), tag("sequence_length")
CLOCKS = tuple(f"{name}_seconds" for name in ("train", "data", "validation", "compile", "wall"))
# Settings in which two runs may differ and yet be one experiment: its seed, and where things lie.
_SAME_EXPERIMENT = re.compile(
    r"seed_everything|ckpt_path|data\.cache_dir|trainer\.(default_root_dir|logger)(\..*)?"
)


class Curve(NamedTuple):
    """Values `y` at `x`, both (n,), in the order of `x`."""

    x: np.ndarray
    y: np.ndarray


class Band(NamedTuple):
    """Mean, least and greatest value of several curves at `x`; each (n,)."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Run:
    """What a run has left in its folder.

    Attributes:
        folder: Of the run.
        name: What it is a run of.
        settings: By their dotted names; empty without a config.yaml.
        record: The record.json; None if the run has not got to its end.
        losses: By loss and axis.
        rates: Learning rate by tokens for each parameter group.
        shapes: Tokens a step and sequence length by tokens, as far as they were logged.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]
    record: Mapping[str, Any] | None
    losses: Mapping[tuple[str, str], Curve]
    rates: Mapping[str, Curve]
    shapes: Mapping[str, Curve]

    @property
    def seed(self) -> Any:
        return (self.record or {}).get("seed", self.settings.get("seed_everything"))

    @cached_property
    def experiment(self) -> dict[str, Any]:
        """The settings but those in which runs of one experiment may differ."""
        return {k: v for k, v in self.settings.items() if not _SAME_EXPERIMENT.fullmatch(k)}

    @property
    def target(self) -> float | None:
        """The target, if it is one of `val_loss`."""
        if self.settings.get("time_to_target.monitor", "val_loss") != "val_loss":
            return None
        return self.settings.get("time_to_target.target")


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds only and all got to their end; or a single run."""

    name: str
    runs: Sequence[Run]

    @property
    def finished(self) -> bool:
        return self.runs[0].record is not None

    def curves(self, loss: str, axis: str) -> list[Curve]:
        """Those of the runs that have one."""
        return [run.losses[loss, axis] for run in self.runs if len(run.losses[loss, axis].x)]

    def seconds(self) -> dict[str, float] | None:
        """What the runs spent their time on, in the mean; None for an unfinished run."""
        if not self.finished:
            return None
        train, data, validation, compiled, wall = (
            float(np.mean([(run.record or {})[clock] for run in self.runs])) for clock in CLOCKS
        )
        return {
            "step": train - data,
            "data wait": data,
            "validation": validation,
            "compile": compiled,
            "rest": max(0.0, wall - train - validation - compiled),
        }


# --- finding ----------------------------------------------------------------------------------


def find(words: Sequence[str]) -> tuple[list[Run], list[Path]]:
    """Read the runs that are asked for, each FOLDER or NAME=FOLDER.

    Returns:
        The runs, and the folders of those that have no curve yet.

    Raises:
        InputError: where there is no folder, no run in it, no run with a curve, or a broken file.
    """
    runs: dict[Path, Run] = {}
    without: list[Path] = []
    for word in words:
        name, folder = _split(word)
        if not folder.is_dir():
            raise InputError(f"{word}: no such folder; name that of a run, or of several")
        found = sorted(_run_folders(folder), key=_natural)
        if not found:
            raise InputError(
                f"{word}: no run in it: no folder with {EVENTS} beside a {CONFIG}; name a folder "
                "as hlbgpt fit makes it, runs/NAME/version_N"
            )
        for each in found:
            if (place := each.resolve()) in runs or each in without:
                continue
            run = read_run(each, name)
            if len(run.losses["val_loss", TOKENS].x) and len(run.losses["val_loss", STEPS].x):
                runs[place] = run
            else:
                without.append(each)
    if not runs:
        raise InputError(
            f"{without[0]}: no curve of val_loss by tokens in its {EVENTS}; wait for the first "
            "validation, or take a run with the logger hlbgpt has by default"
        )
    return list(runs.values()), without


def _split(word: str) -> tuple[str | None, Path]:
    name, equals, folder = word.partition("=")
    if not equals or Path(word).exists():
        return None, Path(word)
    if not name:
        raise InputError(f"{word}: no name before the =; write NAME=FOLDER")
    return name, Path(folder)


def _run_folders(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        if {CONFIG, RECORD} & set(files) and any(Path(place).glob(EVENTS)):
            folders.clear()  # none beneath it
            yield Path(place)


def _natural(path: Path) -> list[list[Any]]:
    """A key that sorts version_10 behind version_9."""
    return [[int(p) if p.isdigit() else p for p in re.split(r"(\d+)", x)] for x in path.parts]


# --- reading ----------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[ScalarEvent]]:
    """Every curve in `folder` as TensorBoard shows it: what a resumed run went back on is gone."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: events.Scalars(name) for name in events.Tags()["scalars"]}


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read the run in `folder`, called `name`, or else after its config.

    Raises InputError for a broken file.
    """
    by_step, by_tokens = scalars(folder), {}
    if (folder / BY_TOKENS).is_dir():
        by_tokens = scalars(folder / BY_TOKENS)
    losses = {}
    for loss in LOSSES:
        there = by_tokens.get(f"loss_{BY_TOKENS}/{loss}", [])
        losses[loss, STEPS] = _curve([(e.step, e.value) for e in by_step.get(tag(loss), [])])
        losses[loss, TOKENS] = _curve([(e.step, e.value) for e in there])
        losses[loss, SECONDS] = _curve([(e.wall_time, e.value) for e in there])
    tokens = {event.step: event.value for event in by_step.get(tag(TOKENS_SEEN), [])}

    def by(name: str) -> Curve:
        return _curve([(tokens[e.step], e.value) for e in by_step[name] if e.step in tokens])

    place = folder.absolute()
    return Run(
        folder=folder,
        name=name
        or name_of(folder)
        or (place.parent.name if place.name.startswith("version_") else place.name),
        settings=_settings(folder / CONFIG),
        record=_record(folder / RECORD),
        losses=losses,
        rates={each.partition("/")[2]: by(each) for each in by_step if each.startswith("lr/")},
        shapes={each: by(each) for each in (STEP_TOKENS, SEQUENCE_LENGTH) if each in by_step},
    )


def _curve(points: Sequence[tuple[float, float]]) -> Curve:
    x, y = np.array(sorted(points, key=lambda point: point[0]), dtype=float).reshape(-1, 2).T
    return Curve(x, y)


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return flat_settings(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no YAML; is it the {CONFIG} of a run?") from error


def _record(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: no JSON; is it the {RECORD} of a run?") from error
    if missing := set(CLOCKS) - set(record):
        raise InputError(f"{path}: no {min(missing)} in it; is it a run of this version?")
    return record


# --- groups -----------------------------------------------------------------------------------


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Put runs together that differ in nothing but their seed, and give each group a name.

    Runs that have not got to their end are by themselves: a mean over others that went further
    would not be one. So are those of a seed that comes twice, for they are not independent.
    """
    alike: list[list[Run]] = []
    for run in runs:
        for others in alike:
            if _belongs(run, others[0]):
                others.append(run)
                break
        else:
            alike.append([run])
    groups: list[list[Run]] = []
    for others in alike:
        seeds = {str(run.seed) for run in others}
        groups += [others] if len(seeds) == len(others) else [[run] for run in others]
    return [Group(n, g) for n, g in zip(_names([g[0] for g in groups]), groups, strict=True)]


def _belongs(run: Run, other: Run) -> bool:
    both_finished = run.record is not None and other.record is not None
    return both_finished and run.name == other.name and run.experiment == other.experiment


def _label(run: Run) -> str:
    return run.name if run.record else f"{run.name}, unfinished"


def _names(firsts: Sequence[Run]) -> list[str]:
    """A name for each group by its first run: with what tells it from others of its name."""

    def shared(name: str, names: Sequence[str]) -> bool:
        return list(names).count(name) > 1

    plain = [_label(run) for run in firsts]
    same = {name: [r for r, p in zip(firsts, plain, strict=True) if p == name] for name in plain}
    telling = [
        f"{name}, {difference}" if len(same[name]) > 1 and difference else name
        for run, name in zip(firsts, plain, strict=True)
        for difference in [_difference(run, same[name])]
    ]
    return [
        f"{before}, {_place(run, same[before])}" if shared(name, telling) else name
        for run, before, name in zip(firsts, plain, telling, strict=True)
    ]


def _difference(run: Run, others: Sequence[Run]) -> str:
    """The settings of `run` in which not all of `others` agree, if they are few."""
    every = [run.experiment, *(other.experiment for other in others)]
    values = {key: [each.get(key, "not set") for each in every] for each in every for key in each}
    found = {key: mine for key, (mine, *its) in values.items() if any(v != mine for v in its)}
    if len(found) > 2:
        return ""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in sorted(found.items()))


def _place(run: Run, others: Sequence[Run]) -> str:
    """Where `run` lies beneath the folder that holds `others` too."""
    place = run.folder.absolute()
    common = os.path.commonpath([other.folder.absolute().parent for other in others])
    return place.relative_to(common).as_posix()


# --- seeds ------------------------------------------------------------------------------------


def band(curves: Sequence[Curve]) -> Band:
    """Mean, least and greatest of `curves` where all of them are, at every x that one has.

    Between its points a curve is taken to be straight.
    """
    low = max((curve.x[0] for curve in curves), default=np.inf)
    high = min((curve.x[-1] for curve in curves), default=-np.inf)
    x = np.unique(np.concatenate([curve.x for curve in curves] or [np.empty(0)]))
    x = x[(x >= low) & (x <= high)]
    if not len(x):
        return Band(x, x, x, x)
    y = np.stack([np.interp(x, *curve) for curve in curves])
    return Band(x, y.mean(0), y.min(0), y.max(0))


def beyond(curve: Curve, whole: Band) -> Curve:
    """The part of `curve` that goes on where the band that it is in ends."""
    if not len(whole.x):
        return curve
    end = whole.x[-1]
    after = curve.x > end
    if not after.any():
        return Curve(np.empty(0), np.empty(0))
    y = np.interp(end, *curve)
    return Curve(np.append(end, curve.x[after]), np.append(y, curve.y[after]))
