"""The settings of runs: reading YAML, naming, comparing and flattening configs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hlbgpt.runs.folder import CONFIG, folder_of
from hlbgpt.utils.errors import InputError

CONFIG_KEY = "hlbgpt_config"  # of the config within a checkpoint
# Arguments that say where a run starts from, not how it trains.
_NO_SETTINGS = ("config", "ckpt_path", "weights_only")
# Settings that a resumed run takes from its checkpoint.
_KEPT = ("model.optimizer.", "model.lr_scheduler.")
_CLASSES = ("model.optimizer.class_path", "model.lr_scheduler.class_path", "model.lr_scheduler")
_HPARAMS = ("model", "data", "schedule", "time_to_target")
# Settings of these sections that do not change what is learned.
_NO_HPARAMS = (
    "data.cache_dir",
    "data.eval_batch_size",
    "data.prompts",
    "model.log_norms",
    "model.sampling",
    "time_to_target.verbose",
)
_TRAINER_HPARAMS = (
    "trainer.max_steps",
    "trainer.devices",
    "trainer.accumulate_grad_batches",
    "trainer.gradient_clip_val",
)
# Aliases let a small text stand for a huge content. Both limits are far above what a run needs.
_MAX_DEPTH, _MAX_EXPANDED = 100, 100_000
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# --- reading YAML ---------------------------------------------------------------------------------


def load_yaml(text: str, name: str) -> Any:
    """The content of a text in YAML; raises InputError, which begins with `name`, for a fault.

    A fault is broken YAML, a key that stands twice in a mapping, of which the first would be lost,
    aliases that expand to a huge content or to themselves, or very deep nesting.
    """
    try:
        require_plain_yaml(text, name)
        return construct_yaml(text, lambda text: yaml.load(text, Loader=_Loader))
    except (yaml.YAMLError, UnicodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise InputError(f"{name}: no YAML{where}: {problem}; mend it") from error


def construct_yaml(text: str, load: Callable[[str], Any]) -> Any:
    """`load(text)`, which then raises YAMLError for values that do not fit their tags, too."""
    try:
        return load(text)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


@dataclass
class _Collection:
    """A mapping or list whose events are being read; size and depth are those when expanded."""

    anchor: str | None
    is_mapping: bool
    size: int = 1
    depth: int = 1
    children: int = 0
    key_lines: dict[str, int] = field(default_factory=dict)

    def add(self, event: yaml.Event, size: int, depth: int, name: str) -> None:
        """Count a child; raises InputError for a key that was there before."""
        self.size, self.depth = self.size + size, max(self.depth, depth + 1)
        if self.is_mapping and self.children % 2 == 0 and isinstance(event, yaml.ScalarEvent):
            line = _line(event)
            if first := self.key_lines.get(event.value):
                raise InputError(
                    f"{name}: {event.value!r:.60} stands at line {first} and again at line {line}, "
                    "and only one of them would count; keep one"
                )
            self.key_lines[event.value] = line
        self.children += 1


def require_plain_yaml(text: str, name: str) -> None:
    """Raise InputError for the faults that `load_yaml` names, YAMLError for broken YAML.

    Only the events of the text are looked at, so nothing is expanded.
    """
    opened: list[_Collection] = []
    known: dict[str | None, tuple[int, int]] = {}  # size and depth of what an anchor names
    for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
        child = None
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append(_Collection(event.anchor, isinstance(event, yaml.MappingStartEvent)))
        elif isinstance(event, yaml.CollectionEndEvent):
            done = opened.pop()
            child = known[done.anchor] = done.size, done.depth
        elif isinstance(event, yaml.AliasEvent):
            holds_itself = any(outer.anchor == event.anchor for outer in opened)
            child = (1, _MAX_DEPTH) if holds_itself else known.get(event.anchor, (1, 0))
        elif isinstance(event, yaml.ScalarEvent):
            child = 1, 0
        if not opened:
            continue
        if child:
            opened[-1].add(event, *child, name)
        if max(len(opened), opened[-1].depth) > _MAX_DEPTH:
            raise InputError(
                f"{name}: line {_line(event)}: nested deeper than {_MAX_DEPTH} levels, or in "
                "itself; settings are not"
            )
        if opened[-1].size > max(_MAX_EXPANDED, number):
            raise InputError(
                f"{name}: line {_line(event)}: its aliases stand for more than {_MAX_EXPANDED} "
                "values; write out what is needed"
            )


def _line(event: yaml.Event) -> int:
    assert event.start_mark is not None
    return event.start_mark.line + 1


# --- configs --------------------------------------------------------------------------------------


def config_name(configs: list[Any] | None) -> str:
    """The run's name: that of the last config file, or of the run whose saved config it is.

    Files in a folder `machines` describe the hardware and do not name a run.
    """
    if not configs:
        return "default"
    paths = [Path(str(config)).resolve() for config in configs]
    path = ([path for path in paths if path.parent.name != "machines"] or paths)[-1]
    return path.parents[1].name if path.name == CONFIG else path.stem


def checkpoint_name(checkpoint: str | Path) -> str:
    """The name of a run that takes its settings from `checkpoint`: that of the checkpoint's run.

    A checkpoint that lies in no run's folder gives its own name.
    """
    folder = folder_of(checkpoint)
    return folder.resolve().parent.name if (folder / CONFIG).is_file() else Path(checkpoint).stem


def changed_settings(stored: str, now: str) -> list[str]:
    """Compare the YAML configs of a checkpoint and of the run that resumes it.

    Returns:
        A line for each setting that differs.

    Raises:
        InputError: the optimizer or the learning-rate schedule is of another class.
    """
    before = flat_settings(load_yaml(stored, "the checkpoint's settings") or {})
    after = flat_settings(load_yaml(now, "the settings") or {})
    lines = []
    for key in {**before, **after}:
        theirs, ours = before.get(key, "not set"), after.get(key, "not set")
        if theirs == ours or key.split(".")[0] in _NO_SETTINGS:
            continue
        line = f"{key}: {theirs} in the checkpoint, {ours} now"
        if key in _CLASSES:
            raise InputError(f"{line}; leave it as it was, or start a new run without ckpt_path")
        kept = "; a resumed run keeps the checkpoint's" if key.startswith(_KEPT) else ""
        lines.append(line + kept)
    return lines


def flat_settings(value: Any, key: str = "") -> dict[str, Any]:
    """Flatten nested settings to a dict of dotted keys; list items get their index as key."""
    if isinstance(value, dict) and value:
        items = value
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = dict(enumerate(value))
    else:
        return {key: value}
    found: dict[str, Any] = {}
    for name, item in items.items():
        found |= flat_settings(item, f"{key}.{name}" if key else str(name))
    return found


def hparams(config: str) -> dict[str, bool | int | float | str]:
    """The settings of a config in YAML that distinguish runs, for the hyperparameters of loggers.

    These are all settings of model, data, schedule and target, and those of the trainer that
    change what is learned. `init_args` and `class_path` are left out of the keys. Precision and
    seed are not among them, because what the config leaves open is known to the trainer only.
    """
    found = {}
    for key, value in flat_settings(load_yaml(config, "the settings") or {}).items():
        name = key.replace("init_args.", "").replace(".class_path", "")
        chosen = name in _TRAINER_HPARAMS or name.split(".")[0] in _HPARAMS
        if chosen and value not in (None, [], {}) and not name.startswith(_NO_HPARAMS):
            found[name] = value if isinstance(value, (bool, int, float)) else str(value)
    return found


def text_settings(config: str) -> dict[str, Any]:
    """The settings of a config in YAML that name the text and its tokens."""
    keys = ("data.source", "data.tokenizer", "data.special_tokens")
    settings = flat_settings(load_yaml(config, "the settings") or {})
    return {key: value for key, value in settings.items() if key.startswith(keys)}
