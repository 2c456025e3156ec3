"""What scripts/benchmark.py is asked for: its options, and the runs that they amount to."""

import argparse
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hlbgpt.cli.checks import require_readable_configs
from hlbgpt.runs.folder import RECORD, last_checkpoint
from hlbgpt.utils.errors import InputError

AS_IS = "as is"
NOTE = "made_from.json"
SEED = "seed_"  # a run's folder is OUT/<config>/<variant>/seed_N/version_0
OURS = ("seed_everything", "ckpt_path", "trainer.default_root_dir", "trainer.logger")


@dataclass(frozen=True)
class Job:
    """A run that is asked for: a variant with a seed, and where it goes."""

    variant: str
    seed: int
    words: list[str]  # of the command line, but for where the run goes
    folder: Path

    @property
    def run_folder(self) -> Path:
        return self.folder / "version_0"  # a name that lets a run be gone on with

    def places(self) -> list[str]:
        """The arguments that send the run to its folder."""
        return [
            f"--trainer.default_root_dir={self.folder}",
            "--trainer.logger=hlbgpt.runs.logger.CurveLogger",
            f"--trainer.logger.save_dir={self.folder}",
            "--trainer.logger.name=",
            f"--trainer.logger.version={self.run_folder.name}",
            "--trainer.logger.default_hp_metric=false",
        ]

    def made_from(self) -> dict[str, Any]:
        """What makes two runs the same: the command, and the text of the configs it names."""
        texts = {path: Path(path).read_text(encoding="utf-8") for path in configs_of(self)}
        return {"words": self.words, "configs": texts}

    def left_before(self) -> dict[str, Any]:
        """What an earlier call noted of its run here; empty if there is none."""
        path = self.folder / NOTE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def note(self, resumed: int) -> None:
        """Write down what the run is made from, and how often it was resumed."""
        text = json.dumps({**self.made_from(), "resumed": resumed}, indent=2)
        temporary = self.folder / f".{NOTE}"
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(self.folder / NOTE)


def configs_of(job: Job) -> list[str]:
    """The config files that the command names."""
    pairs = zip(job.words, [*job.words[1:], ""], strict=True)
    named = [(word.partition("="), after) for word, after in pairs]
    found = [value or after for (name, _, value), after in named if name in ("--config", "-c")]
    return [path for path in found if Path(path).is_file()]


# --- what is asked for ------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an argument."""

    def error(self, message: str) -> NoReturn:
        hint = "; arguments of hlbgpt go behind --" if "unrecognized" in message else ""
        raise InputError(message.removeprefix("argument ") + hint)


def parse(arguments: Sequence[str], description: str) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the arguments of hlbgpt behind `--`."""
    words = list(arguments)
    split = words.index("--") if "--" in words else len(words)
    parser = Parser(
        description=description,
        epilog="What follows -- are arguments of hlbgpt for all runs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", default=[], help="config file; may repeat")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--first-seed", type=int, default=0, help="the others follow it")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar='"NAME: ARGUMENTS"',
        help="arguments of hlbgpt laid over each config; may repeat",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="folder")
    return parser.parse_args(words[:split]), words[split + 1 :]


def variants(given: Sequence[str]) -> dict[str, list[str]]:
    """The arguments of each variant by its name, the config as it is first.

    Raises InputError, as do the functions below, where no benchmark can be made of the options.
    """
    found: dict[str, list[str]] = {AS_IS: []}
    for text in given:
        name, colon, rest = (part.strip() for part in text.partition(":"))
        if not colon or not re.fullmatch(r"\w[\w .+=-]*", name):
            raise InputError(
                f"--variant: no name in {text!r}; write 'NAME: ARGUMENTS', the name of letters, "
                "digits, spaces and .+=-_"
            )
        if _folder_name(name) in map(_folder_name, found):
            what = "is the config without arguments" if name == AS_IS else "is there twice"
            raise InputError(f"--variant: the name {name!r} {what}; choose another")
        found[name] = _hlbgpt_arguments(f"--variant {name!r}", rest)
        if not found[name]:
            raise InputError(f"--variant: {name!r} has no arguments; the config as is runs anyway")
    return found


def _folder_name(name: str) -> str:
    return name.casefold().replace(" ", "_")


def _hlbgpt_arguments(option: str, text: str) -> list[str]:
    """Split arguments as a shell does, and refuse those that are the benchmark's to set."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"{option}: cannot read {text!r}: {error}; mend the quotes") from error
    for word in words:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and name.startswith(OURS):
            raise InputError(f"{option}: --{name} is set by the benchmark itself; leave it out")
    return words


def jobs(options: argparse.Namespace, common: list[str]) -> list[Job]:
    """The runs that are asked for, in their order."""
    for name, value, least in (("seeds", options.seeds, 1), ("first-seed", options.first_seed, 0)):
        if value < least:
            raise InputError(f"--{name}: {value} is less than {least}; set it to at least {least}")
    if not options.config:
        raise InputError("--config: none given; name a config file, as configs/quickstart.yaml")
    common = _hlbgpt_arguments("--", shlex.join(common))
    named = variants(options.variant)
    stems: set[str] = set()
    for config in options.config:
        if not Path(config).is_file():
            raise InputError(f"--config: no file {config!r}; name a config file")
        if Path(config).stem in stems:
            raise InputError(f"--config: two files are called {Path(config).stem!r}; rename one")
        stems.add(Path(config).stem)
    asked = [
        Job(
            variant=label(Path(config).stem, name, len(stems)),
            seed=seed,
            words=["--config", config, *common, *extra, "--seed_everything", str(seed)],
            folder=options.out / Path(config).stem / _folder_name(name) / f"{SEED}{seed}",
        )
        for seed in range(options.first_seed, options.first_seed + options.seeds)
        for config in options.config
        for name, extra in named.items()
    ]
    for job in asked:
        require_readable_configs(job.words)
    return asked


def label(config: str, variant: str, configs: int) -> str:
    """What a variant of a config is called where there are that many configs."""
    if configs == 1:
        return variant
    return config if variant == AS_IS else f"{config}, {variant}"


def name_of(run_folder: Path) -> str | None:
    """What the run that a benchmark left in `run_folder` is a run of; None if it is none."""
    folder = run_folder.absolute().parent
    if not (folder / NOTE).is_file() or not folder.name.startswith(SEED):
        return None
    variant, config = folder.parents[0].name, folder.parents[1].name
    return label(config, variant.replace("_", " "), configs=2)


def require_same_as_before(job: Job) -> None:
    """Raise InputError if the folder holds a run of something else; results are not overwritten."""
    kept = [job.run_folder / RECORD, last_checkpoint(job.run_folder)]
    if any(path.is_file() for path in kept):
        before = job.left_before()
        if {key: before.get(key) for key in ("words", "configs")} != job.made_from():
            raise InputError(
                f"--out: {job.folder} holds a run with other arguments or another text of its "
                "config; name another folder, or remove that one"
            )
