"""The argument parser, whose errors are one line."""

import re
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from hlbgpt.utils.errors import InputError

# A setting of a class that may also be null: jsonargparse says why it is not a null, too.
_OF_OPTIONAL_CLASS = re.compile(
    r'Parser key "(?P<key>\S+)": Does not validate against any of the Union subtypes .*?'
    r"- Problem with given class_path '\S+': (Parser key \"(?P<setting>\S+)\": )?(?P<problem>.*)"
    r" - Expected a <class 'NoneType'> Given value type: .*"
)


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


def one_line(message: object) -> str:
    """A message without line breaks and repeated spaces."""
    return " ".join(str(message).split())


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
