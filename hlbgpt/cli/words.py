"""The words of a command line before they are parsed: checks, and the settings in a checkpoint."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hlbgpt.runs.checkpoint_io import stored_settings
from hlbgpt.runs.config import load_yaml
from hlbgpt.runs.folder import last_checkpoint, newest_checkpoint
from hlbgpt.runs.ranks import decide
from hlbgpt.runs.trust import foreign_name
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import expand_path, require_regular

_HELP = ("--help", "-h", "--print_config")
TRUST = "--trust"


def checked(words: Sequence[str]) -> list[str]:
    """The words of a command, configs first; if none is named, the settings in the checkpoint.

    Raises InputError for a command that cannot be meant so.
    """
    command, *rest = words or [""]
    trusted, rest = TRUST in rest, [word for word in rest if word != TRUST]
    stored: list[str] = []
    names = [name for name, _ in options(rest)]
    _require_readable_configs(rest)
    asks_for_help = any(word.startswith(_HELP) or ".help" in word for word in rest)
    if not command.startswith("-") and not asks_for_help:
        if command == "fit":
            _require_config(names)
        elif "--ckpt_path" not in names and "--config" not in names:
            raise no_checkpoint(command)
        if "--ckpt_path" in names and "--config" not in names:
            stored, rest = _with_stored_settings(rest, trusted)
    configs, others = split_configs(rest)
    return [command, *stored, *configs, *others]


def options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and values of `--name value` and `--name=value`; no value is an empty string."""
    for word, after in zip(words, [*words[1:], ""], strict=False):
        if word.startswith("--") or word.partition("=")[0] == "-c":
            name, equals, value = word.partition("=")
            name = "--config" if name == "-c" else name
            yield name, value if equals else "" if after.startswith("--") else after


def split_configs(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Config files, and the other words: a file would override what is typed before it."""
    configs, others, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if word in ("--config", "-c") and rest:
            configs += [word, rest.pop(0)]
        elif word.startswith(("--config=", "-c=")):
            configs.append(word)
        else:
            others.append(word)
    return configs, others


def last_value(words: Sequence[str], name: str) -> str | None:
    """The value of an option that counts: the last one; None if the words lack it."""
    return dict(options(words)).get(name)


def require_file(path: str | Path) -> Path:
    """The path of a checkpoint; raises InputError if there is no such file."""
    found = expand_path(path, "ckpt_path")
    if not found.is_file():
        raise InputError(
            f"ckpt_path: no file {str(path)!r}; name a checkpoint (.ckpt), or 'last' for that of "
            "the newest run"
        )
    return found


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
        return Path(decide("ckpt_path", lambda: str(newest_checkpoint(name))))
    return require_file(last_checkpoint(expand_path(root, "trainer.default_root_dir")))


def _with_stored_settings(words: list[str], trusted: bool) -> tuple[list[str], list[str]]:
    """The settings in the checkpoint that `words` name, and the words, which then name the file."""
    path = last_value(words, "--ckpt_path")
    if path == "last":
        root = last_value(words, "--trainer.default_root_dir")
        path = str(find_last(last_value(words, "--run_name"), root))
    path = str(require_file(str(path)))
    text = stored_settings(path)
    if not trusted:
        require_own_classes(text, path)
    print(f"settings: those in {path}", file=sys.stderr)
    # Longer than any path, so that the parser cannot take it for one. The last --ckpt_path counts.
    return ["--config", f"{text}\n#{' ' * 4096}"], [*words, "--ckpt_path", path]


def require_own_classes(text: str, path: str) -> None:
    """Raise InputError where the settings in the checkpoint `path` would run code of others."""
    name = foreign_name(load_yaml(text, f"ckpt_path: the settings in {path!r}"))
    if name is not None:
        raise InputError(
            f"ckpt_path: the settings in {path!r} name {name!r:.200}, which is no class of hlbgpt, "
            f"torch or lightning and could run any code; add {TRUST} if you trust whoever made "
            "the checkpoint, or --config with settings of your own"
        )


def _require_config(names: list[str]) -> None:
    if not any(name.startswith(("--config", "--ckpt_path", "--model.net")) for name in names):
        raise InputError(
            "config: none given; start with one, as in hlbgpt fit --config configs/quickstart.yaml"
        )


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
