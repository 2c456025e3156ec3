"""The words of a command line before they are parsed: checks, and the saved config of a run."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hlbgpt.runs.config import load_yaml
from hlbgpt.runs.folder import CONFIG, folder_of, last_checkpoint, newest_checkpoint
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import expand_path, require_regular

_HELP = ("--help", "-h", "--print_config")


def checked(words: Sequence[str]) -> list[str]:
    """The words of a command, config files first; if none is named, that of the checkpoint's run.

    Raises InputError for a command that cannot be meant so.
    """
    command, *rest = words or [""]
    names = [name for name, _ in options(rest)]
    asks_for_help = any(word.startswith(_HELP) or ".help" in word for word in rest)
    if not command.startswith("-") and not asks_for_help:
        if command == "fit":
            _require_config(names)
        elif "--ckpt_path" not in names and "--config" not in names:
            raise no_checkpoint(command)
        rest = _with_saved_config(rest, names)
    _require_readable_configs(rest)
    return [command, *_configs_first(rest)]


def options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and values of `--name value` and `--name=value`; no value is an empty string."""
    for word, after in zip(words, [*words[1:], ""], strict=False):
        if word.startswith("--") or word.partition("=")[0] == "-c":
            name, equals, value = word.partition("=")
            name = "--config" if name == "-c" else name
            yield name, value if equals else "" if after.startswith("--") else after


def last_value(words: Sequence[str], name: str) -> str | None:
    """The value of an option that counts: the last one; None if the words lack it."""
    return dict(options(words)).get(name)


def require_file(path: str | Path) -> Path:
    """The path of a checkpoint; raises InputError if there is no such file."""
    if not Path(path).is_file():
        raise InputError(
            f"ckpt_path: no file {str(path)!r}; name a checkpoint (.ckpt), or 'last' for that of "
            "the newest run"
        )
    return Path(path)


def no_checkpoint(command: str) -> InputError:
    """The error of a command that would use a network as it was initialized."""
    return InputError(
        f"ckpt_path: not given, so `{command}` would use a network that was never trained; add "
        "--ckpt_path last, or the path of a checkpoint"
    )


def find_last(name: str | None, root: str | None) -> Path:
    """The checkpoint that `last` stands for.

    Args:
        name: Name of the runs to search, in `runs`; None for all.
        root: A folder of a run's own, `trainer.default_root_dir`, which is looked into instead.
    """
    if root is None:
        return newest_checkpoint(name)
    return require_file(last_checkpoint(expand_path(root, "trainer.default_root_dir")))


def _with_saved_config(words: list[str], names: list[str]) -> list[str]:
    path = last_value(words, "--ckpt_path")
    if path is None or "--config" in names:
        return words
    if path == "last":
        root = last_value(words, "--trainer.default_root_dir")
        checkpoint = find_last(last_value(words, "--run_name"), root)
    else:
        checkpoint = require_file(path)
    config = folder_of(checkpoint) / CONFIG
    if not config.is_file():
        raise InputError(
            f"ckpt_path: {str(checkpoint)!r} has no {str(config)!r}; add --config with the "
            "settings of its run"
        )
    print(f"settings: {config}", file=sys.stderr)
    # The last --ckpt_path counts: this one names the file even if the user wrote "last".
    return ["--config", str(config), *words, "--ckpt_path", str(checkpoint)]


def _require_config(names: list[str]) -> None:
    if not any(name.startswith(("--config", "--ckpt_path", "--model.net")) for name in names):
        raise InputError(
            "config: none given; start with one, as in hlbgpt fit --config configs/quickstart.yaml"
        )


def _configs_first(words: Sequence[str]) -> list[str]:
    """Move config files to the front: a file would override what is typed before it."""
    configs, others, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if word in ("--config", "-c") and rest:
            configs += [word, rest.pop(0)]
        elif word.startswith(("--config=", "-c=")):
            configs.append(word)
        else:
            others.append(word)
    return [*configs, *others]


def _require_readable_configs(words: Sequence[str]) -> None:
    """Raise InputError, with the file's name, for a `--config` that is no YAML mapping."""
    for name, value in options(words):
        if name != "--config":
            continue
        path = expand_path(value, "--config")
        if not path.exists() or path.is_dir():  # the parser has words for that
            continue
        require_regular(path, "--config")
        try:
            settings = load_yaml(path.read_text(encoding="utf-8"), f"--config {path}")
        except UnicodeDecodeError as error:
            raise InputError(
                f"--config {path}: not UTF-8 text at byte {error.start}; is it a config file?"
            ) from error
        if not isinstance(settings, dict):
            raise InputError(
                f"--config {path}: holds no settings but {settings!r:.60}; write some as in the "
                "files of configs/"
            )
