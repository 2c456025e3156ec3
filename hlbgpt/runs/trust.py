"""Whose code the settings in a checkpoint would run, told without running any of it.

Whoever resumes from a checkpoint or generates text with it has typed a path and no class. So the
settings stored in it may name classes of hlbgpt, torch and lightning, of the kinds that settings
are for, and nothing else that could be imported.
"""

import functools
import inspect
import os
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hlbgpt.runs.config import load_yaml
from hlbgpt.runs.folder import CONFIG
from hlbgpt.utils.errors import InputError

PACKAGES = ("hlbgpt", "torch", "lightning")
# By name, so that the rooms above need not be imported. Others of these packages could run what
# their arguments name, as LightningCLI does.
_KINDS = {
    "hlbgpt.data.sources.TextSource",
    "hlbgpt.data.step_loader.StepLoader",
    "hlbgpt.models.base.Network",
    "lightning.fabric.accelerators.accelerator.Accelerator",
    "lightning.fabric.plugins.environments.cluster_environment.ClusterEnvironment",
    "lightning.fabric.plugins.io.checkpoint_io.CheckpointIO",
    "lightning.fabric.plugins.precision.precision.Precision",
    "lightning.pytorch.callbacks.callback.Callback",
    "lightning.pytorch.loggers.logger.Logger",
    "lightning.pytorch.plugins.layer_sync.LayerSync",
    "lightning.pytorch.profilers.profiler.Profiler",
    "lightning.pytorch.strategies.strategy.Strategy",
    "torch.optim.lr_scheduler.LRScheduler",
    "torch.optim.optimizer.Optimizer",
}
# The classes whose arguments are the settings of a section.
_SECTIONS = {
    "data": "hlbgpt.data.TokenDataModule",
    "model": "hlbgpt.training.module.LanguageModule",
    "trainer": "lightning.Trainer",
}
_TEXTS = ("ckpt_path", "run_name")  # settings beside the sections that the parser takes as text
# Functions that settings may name: they round gradients while those are sent.
_HOOKS = "torch.distributed.algorithms.ddp_comm_hooks.default_hooks."
_FUNCTIONS = {f"{_HOOKS}{kind}_compress_hook" for kind in ("bf16", "fp16")}
_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_PLAIN = (str, int, float, bool, type(None), Path)
_OF_PLAIN = (typing.Union, types.UnionType, list, tuple, Sequence)


def foreign_name(settings: Any) -> str | None:
    """What `settings` name that may run code of others; None if there is no such thing.

    Args:
        settings: A config as read from YAML, with the settings of one command.
    """
    if not isinstance(settings, dict):
        return next(_foreign(settings), None)
    for name, section in settings.items():
        annotation: Any = str if name in _TEXTS else Any
        if name in _SECTIONS:
            annotation = pkgutil.resolve_name(_SECTIONS[name])
        if (found := next(_foreign(section, annotation), None)) is not None:
            return found
    return None


def trust_flag(folder: Path) -> str:
    """` --trust` where a command needs it to use a checkpoint of the run in `folder`."""
    path = folder / CONFIG
    if not path.is_file():
        return ""
    return " --trust" if foreign_name(load_yaml(path.read_text("utf-8"), str(path))) else ""


def _foreign(value: Any, annotation: Any = Any) -> Iterator[str]:
    """What a value names, wherever the parser may take text for a class, a function or a file."""
    if isinstance(value, str):
        if not _is_plain(annotation):
            yield from _foreign_text(value)
    elif isinstance(value, list):
        for item in value:
            yield from _foreign(item, annotation if _is_plain(annotation) else Any)
    elif isinstance(value, dict) and "class_path" in value:
        if made := _allowed_class(value["class_path"]):
            rest = {name: item for name, item in value.items() if name != "class_path"}
            arguments = rest.pop("init_args", None)
            yield from _foreign(arguments, made)
            yield from _foreign(rest)
        else:
            yield str(value["class_path"])
    elif isinstance(value, dict):  # of a class, or of a section with settings of one
        annotations = _annotations(annotation)
        for name, item in value.items():
            yield from _foreign(item, annotations.get(name, Any))


def _foreign_text(text: str) -> Iterator[str]:
    if os.path.isfile(os.path.expanduser(text)):  # settings could be read from it
        yield text
    try:
        value = load_yaml(text, "")
    except InputError:  # then it is a text for the parser, too
        return
    if value != text and isinstance(value, (str, list, dict)):
        yield from _foreign(value)
    elif text in _FUNCTIONS:
        return
    elif _IMPORT_PATH.fullmatch(text) and not _allowed_class(text):
        package = text.partition(".")[0]
        if package in sys.modules or find_spec(package):
            yield text


def _allowed_class(path: Any) -> type | None:
    """The class at an import path, if it is one that settings may name; imports nothing else."""
    if not isinstance(path, str) or not _IMPORT_PATH.fullmatch(path):
        return None
    if path.partition(".")[0] not in PACKAGES:
        return None
    try:
        found = pkgutil.resolve_name(path)
    except Exception:  # of any kind: modules of the packages may need others that are not there
        return None
    if not isinstance(found, type) or found.__module__.partition(".")[0] not in PACKAGES:
        return None
    names = {f"{base.__module__}.{base.__qualname__}" for base in found.__mro__}
    return found if names & _KINDS else None


@functools.cache
def _annotations(made: Any) -> dict[str, Any]:
    """The types of a class's arguments; none if they cannot be told, so that all are looked at."""
    try:
        return typing.get_type_hints(made.__init__) if inspect.isclass(made) else {}
    except (NameError, TypeError):
        return {}


def _is_plain(annotation: Any) -> bool:
    """Whether an argument of this type is text, numbers or lists of them, and never imported."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in _OF_PLAIN:
        return bool(arguments) and all(map(_is_plain, arguments))
    return annotation in _PLAIN or origin is typing.Literal
