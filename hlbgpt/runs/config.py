"""The settings of runs: finding saved configs, comparing and flattening them."""

from pathlib import Path
from typing import Any

import yaml

from hlbgpt.runs.folder import CONFIG
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


def config_name(configs: list[Any] | None) -> str:
    """The run's name: that of the last config file, or of the run whose saved config it is.

    Files in a folder `machines` describe the hardware and do not name a run.
    """
    if not configs:
        return "default"
    paths = [Path(str(config)).resolve() for config in configs]
    path = ([path for path in paths if path.parent.name != "machines"] or paths)[-1]
    return path.parents[1].name if path.name == CONFIG else path.stem


def changed_settings(stored: str, now: str) -> list[str]:
    """Compare the YAML configs of a checkpoint and of the run that resumes it.

    Returns:
        A line for each setting that differs.

    Raises:
        InputError: the optimizer or the learning-rate schedule is of another class.
    """
    before, after = (flat_settings(yaml.safe_load(text) or {}) for text in (stored, now))
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
    for key, value in flat_settings(yaml.safe_load(config) or {}).items():
        name = key.replace("init_args.", "").replace(".class_path", "")
        chosen = name in _TRAINER_HPARAMS or name.split(".")[0] in _HPARAMS
        if chosen and value not in (None, [], {}) and not name.startswith(_NO_HPARAMS):
            found[name] = value if isinstance(value, (bool, int, float)) else str(value)
    return found


def text_settings(config: str) -> dict[str, Any]:
    """The settings of a config in YAML that name the text and its tokens."""
    keys = ("data.source", "data.tokenizer", "data.special_tokens")
    settings = flat_settings(yaml.safe_load(config) or {})
    return {key: value for key, value in settings.items() if key.startswith(keys)}
