"""The command `hlbgpt`. Help and version are answered at once, before torch is imported."""

import sys
from collections.abc import Sequence

from hlbgpt import __version__
from hlbgpt.utils.command import command, killed_by_signals
from hlbgpt.utils.errors import InputError

COMMANDS = {
    "fit": "Train until the target is met, and record the time.",
    "validate": "Measure a checkpoint on the validation split.",
    "test": "Measure a checkpoint on the test split.",
    "predict": "Continue prompts with a checkpoint, and print the text.",
}
DESCRIPTION = "Train a small GPT until its validation loss meets a target, and time it."
_HELP = """\
usage: hlbgpt COMMAND [--config FILE ...] [--SETTING VALUE ...]

{description}

{commands}

  hlbgpt fit --config configs/quickstart.yaml     train
  hlbgpt fit --ckpt_path last                     resume the newest run
  hlbgpt predict --ckpt_path last --data.prompts 'The '

hlbgpt COMMAND --help explains every setting, and --version prints the versions. For completion in
the shell: pip install shtab, and eval "$(hlbgpt --print_completion shtab-bash)" (or shtab-zsh).
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the words are those of `sys.argv` unless others are given.

    Raises SystemExit where the exit code is not 0; see `hlbgpt.utils.command`.
    """
    if code := _main(list(sys.argv[1:] if arguments is None else arguments)):
        raise SystemExit(code)


@command("hlbgpt")
def _main(words: list[str]) -> None:
    first = words[0] if words else "--help"
    if first in ("-h", "--help"):
        commands = "\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())
        print(_HELP.format(description=DESCRIPTION, commands=commands), end="")
    elif first == "--version":
        print(f"hlbgpt {__version__} ({', '.join(_versions())})")
    elif first not in COMMANDS and not first.startswith("-"):
        raise InputError(f"no command {first!r}; use one of {', '.join(COMMANDS)}")
    else:
        with killed_by_signals("hlbgpt"):
            from hlbgpt.cli.main import main as run_command
        run_command(words)


def _versions() -> list[str]:
    from importlib.metadata import PackageNotFoundError, version  # takes a while, too

    found = ["Python {}.{}.{}".format(*sys.version_info[:3])]
    for package in ("torch", "lightning"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return found


if __name__ == "__main__":
    main()
