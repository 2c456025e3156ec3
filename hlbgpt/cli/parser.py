"""The argument parser, whose errors are one line."""

from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser


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
        raise UsageError(f"{one_line(message)} (see {command} --help)")


def one_line(message: object) -> str:
    """A message without line breaks and repeated spaces."""
    return " ".join(str(message).split())
