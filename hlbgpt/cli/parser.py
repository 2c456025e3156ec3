"""The argument parser, whose errors are one line."""

import re
import textwrap
import traceback
from enum import Enum
from typing import Any, NoReturn

import lightning as L
import yaml
from jsonargparse import get_loader, set_dumper, set_loader
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hlbgpt.runs.config import construct_yaml, require_plain_yaml
from hlbgpt.utils.errors import InputError, one_line

# A setting of a class that may also be null: jsonargparse says why it is not a null, too.
_OF_OPTIONAL_CLASS = re.compile(
    r'Parser key "(?P<key>\S+)": Does not validate against any of the Union subtypes .*?'
    r"- Problem with given class_path '\S+': (Parser key \"(?P<setting>\S+)\": )?(?P<problem>.*)"
    r" - Expected a <class 'NoneType'> Given value type: .*"
)

# Frames of a traceback: packages whose own errors become a line, and what restores a checkpoint.
_LIBRARIES = ("lightning", "torch")
_RESTORING = (
    "_restore_modules_and_callbacks",
    "restore_training_state",
    "_load_combined_loader_states",
)


class _Dumper(yaml.SafeDumper):
    """Writes a member of an Enum as its value; Lightning's Timer has one as a default."""


_Dumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


def _dump(settings: Any) -> str:
    """As jsonargparse does."""
    return yaml.dump(
        settings, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False
    )


_load_as_jsonargparse_does = get_loader("yaml")


def _load(text: str) -> Any:
    """A value of the command line, a config file, or a file that either names."""
    require_plain_yaml(text, "YAML")
    return construct_yaml(text, _load_as_jsonargparse_does)


set_dumper("yaml", _dump)
set_loader("yaml", _load, exceptions=(yaml.YAMLError,))


class UsageError(SystemExit):
    """The command line makes no sense; jsonargparse lets this pass where it catches others.

    Attributes:
        message: What is wrong with it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message


class Parser(LightningArgumentParser):
    """Says in one line what is wrong with an argument or a config file."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse itself asks for the exception
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        raise UsageError(f"{_shorter(one_line(message))} (see {command} --help)")


def _shorter(message: str) -> str:
    if not (found := _OF_OPTIONAL_CLASS.match(message)):
        return message
    key = ".".join(name for name in (found["key"], found["setting"]) if name)
    return f'Parser key "{key}": {found["problem"]}'


def constructor_error(error: BaseException, made: type | None = None) -> InputError:
    """What a class named in the config raised when it was built, as one line.

    Messages of ValueErrors are written for users; other errors are named by their types too.
    """
    message = one_line(error) or "no message"
    if isinstance(error, (InputError, MisconfigurationException)) or type(error) is ValueError:
        return InputError(message)
    where = f"{made.__name__}: " if made else ""
    return InputError(f"{where}{type(error).__name__}: {message}")


def library_error(error: BaseException) -> InputError | None:
    """The line for an error that libraries raise for what they were given; None for others.

    These are errors while a checkpoint is restored, and of libraries' callbacks, optimizers and
    schedules. Those of a user's own show where they failed.
    """
    found: object = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module, here = frame.f_globals["__name__"], frame.f_locals.get("self")
        if module.startswith("lightning.") and frame.f_code.co_name in _RESTORING:
            return InputError(
                f"ckpt_path: a state in the checkpoint cannot be restored ({_named(error)}); it is "
                "damaged, or of other classes or versions; use another checkpoint"
            )
        if isinstance(here, (L.Callback, Optimizer, LRScheduler)):
            found = here
        if module.partition(".")[0] not in _LIBRARIES and not module.startswith("hlbgpt.optim."):
            found = None
    if isinstance(found, (Optimizer, LRScheduler)):
        return InputError(
            f"{type(found).__name__}: {_named(error)}; its settings or, in a resumed run, its "
            "state in the checkpoint do not fit; change them, or use another checkpoint"
        )
    return constructor_error(error, type(found)) if found is not None else None


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 200)}"
