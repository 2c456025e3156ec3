"""Run configs, and variants of them, with the same seeds, and compare the results.

    python scripts/benchmark.py --config configs/quickstart.yaml --seeds 3 \\
        --variant "no warm-up: --model.lr_scheduler.pct_start 0.001" -- --trainer.max_steps=500

Each config is run as it is and with the arguments of each --variant. Arguments after -- are given
to all runs. All variants run with one seed before the next seed starts, so that a machine that
slows down affects all variants alike. The same command resumes an interrupted benchmark. A run's
folder is OUT/<config>/<variant>/seed_N, and what it prints is in seed_N.log beside that folder;
the results are in OUT/results.md, .csv and .json. The exit code is 1 if a run failed.
"""

import argparse
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from benchmark_results import BenchmarkRun, markdown, summarize, write

from hlbgpt.runs.folder import CONFIG, RECORD, last_checkpoint
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import atomic_write, locked

AS_IS = "as is"
SET_BY_BENCHMARK = ("--seed_everything", "--ckpt_path", "--trainer.default_root_dir")
ERROR_LINE = re.compile(r"hlbgpt: error|[\w.]*(Error|Exception)\b")


@dataclass(frozen=True)
class Job:
    """One run of the benchmark: a variant of a config with a seed.

    Attributes:
        variant: Name of the variant, with the config's name if there are several configs.
        seed: The random seed.
        arguments: Arguments of `hlbgpt fit`, except for those that set folder and checkpoint.
        folder: The run's folder.
    """

    variant: str
    seed: int
    arguments: list[str]
    folder: Path

    @property
    def done(self) -> bool:
        return (self.folder / RECORD).is_file()

    def beside(self, suffix: str) -> Path:
        """A file beside the folder: .log for what the run prints, .json for its inputs."""
        return self.folder.with_name(self.folder.name + suffix)

    def inputs(self) -> dict[str, Any]:
        """What determines the result of the run: arguments, and the text of the config files."""
        paths = [Path(argument.rpartition("=")[2]) for argument in self.arguments]
        configs = [path for path in paths if path.suffix in (".yaml", ".yml") and path.is_file()]
        texts = {str(path): path.read_text("utf-8", "replace") for path in configs}
        return {"arguments": self.arguments, "configs": texts}

    def require_same_inputs(self) -> None:
        """Raise InputError if the folder holds a run that was made from other inputs."""
        file, there = self.beside(".json"), self.done or last_checkpoint(self.folder).is_file()
        if there and not (file.is_file() and json.loads(file.read_text()) == self.inputs()):
            raise InputError(
                f"--out: {self.folder} holds a run with other arguments or another text of its "
                "config; name another folder, or remove that one"
            )


# --- options ----------------------------------------------------------------------------------


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; returns the options and the arguments after `--`."""
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", required=True, help="may be repeated")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar='"NAME: ARGUMENTS"',
        help="arguments of hlbgpt to add to each config; may be repeated",
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--first-seed", type=int, default=0, help="first seed (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmark"), help="folder (default: %(default)s)"
    )
    return parser.parse_args(words[:split]), list(words[split + 1 :])


def parse_variants(given: Sequence[str]) -> dict[str, list[str]]:
    """Arguments of each variant by its name; the first is the config as it is.

    Raises:
        InputError: if a variant has no valid name, no arguments, or the name of another.
    """
    variants: dict[str, list[str]] = {AS_IS: []}
    for text in given:
        name, _, rest = (part.strip() for part in text.partition(":"))
        if not re.fullmatch(r"\w[\w .+=-]*", name):
            raise InputError(
                f"--variant: no name in {text!r}; write 'NAME: ARGUMENTS' with a name of letters, "
                "digits, spaces and .+=-_"
            )
        if _folder_name(name) in map(_folder_name, variants):
            raise InputError(f"--variant: the name {name!r} is taken; choose another")
        try:
            variants[name] = shlex.split(rest)
        except ValueError as error:
            raise InputError(f"--variant {name!r}: cannot read {rest!r}: {error}") from error
        if not variants[name]:
            raise InputError(f"--variant: {name!r} has no arguments; the config as is runs anyway")
    return variants


def _folder_name(variant: str) -> str:
    return variant.casefold().replace(" ", "_")


def make_jobs(options: argparse.Namespace, common: Sequence[str]) -> list[Job]:
    """All runs that the options ask for, in the order in which they run.

    Raises:
        InputError: if an option has an invalid value.
    """
    for name, value, least in (("seeds", options.seeds, 1), ("first-seed", options.first_seed, 0)):
        if value < least:
            raise InputError(f"--{name}: {value} is less than {least}; set it to at least {least}")
    configs = {Path(config).stem: config for config in options.config}
    if len(configs) < len(options.config):
        raise InputError("--config: two files have the same name; rename one")
    for config in options.config:
        if not Path(config).is_file():
            raise InputError(f"--config: no file {config!r}; name a config file")
    variants = parse_variants(options.variant)
    for word in [*common, *(word for words in variants.values() for word in words)]:
        if word.partition("=")[0] in SET_BY_BENCHMARK:
            raise InputError(f"{word}: is set by the benchmark itself; leave it out")
    jobs = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for stem, config in configs.items():
            for name, extra in variants.items():
                label = name if len(configs) == 1 else stem if name == AS_IS else f"{stem}, {name}"
                arguments = ["--config", config, *common, *extra, f"--seed_everything={seed}"]
                folder = options.out / stem / _folder_name(name) / f"seed_{seed}"
                jobs.append(Job(label, seed, arguments, folder))
    return jobs


# --- running ----------------------------------------------------------------------------------


def launch(words: list[str], log: Path) -> int:
    """Run `hlbgpt` in its own process; an interrupt stops it gracefully. Returns the exit code."""
    with log.open("ab") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "hlbgpt", *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise


def run(job: Job) -> BenchmarkRun:
    """Start or resume a run and wait until it ends."""
    words = ["fit", *job.arguments, f"--trainer.default_root_dir={job.folder}"]
    if (checkpoint := last_checkpoint(job.folder)).is_file():
        words += ["--ckpt_path", str(checkpoint)]
    else:
        shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(job.beside(".json")) as temporary:
        temporary.write_text(json.dumps(job.inputs(), indent=2))
    log = job.beside(".log")
    log.write_text(f"$ {shlex.join(['hlbgpt', *words])}\n")
    code = launch(words, log)
    return result(job, error_in(log.read_text(errors="replace"), code))


def error_in(log: str, code: int) -> str | None:
    """Why a process failed: its exit code and its last error message; None if it did not fail.

    The first line of the log is the command.
    """
    if code == 0:
        return None
    lines = [line.strip() for line in log.splitlines()[1:] if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line)]
    reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return ": ".join([reason, *(errors or lines)[-1:]])


def result(job: Job, error: str | None = None) -> BenchmarkRun:
    """Read the result of a run; `error` is used if the run has no record."""
    record: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    if job.done:  # the run is complete, whatever the exit code of its process
        record = json.loads((job.folder / RECORD).read_text())
        settings = yaml.safe_load((job.folder / CONFIG).read_text())
        error = None
        if record["value"] is None:
            error = "never validated; make trainer.val_check_interval smaller"
        elif not math.isfinite(record["value"]):
            error = f"{record['monitor']} is {record['value']}"
    elif error is None:
        error = f"no {RECORD} in {job.folder}"
    return BenchmarkRun(
        variant=job.variant,
        seed=job.seed,
        folder=str(job.folder),
        error=error,
        record={} if error else record,
        mode=settings.get("time_to_target", {}).get("mode", "min"),
        max_steps=settings.get("trainer", {}).get("max_steps", -1),
    )


def run_all(jobs: Sequence[Job]) -> Iterator[BenchmarkRun]:
    """Run every job that has no record yet, and print a line for each job."""
    for k, job in enumerate(jobs, start=1):
        print(f"[{k} of {len(jobs)}] {job.variant}, seed {job.seed}: ", end="", flush=True)
        kept = job.done
        found = result(job) if kept else run(job)
        print(("kept: " if kept else "") + found.in_a_line(), flush=True)
        yield found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options, common = parse(words)
    try:
        jobs = make_jobs(options, common)
        options.out.mkdir(parents=True, exist_ok=True)
        with locked(options.out, wait=False) as held:
            if not held:
                raise InputError(f"--out: another benchmark is running in {options.out}; wait")
            for job in jobs:
                job.require_same_inputs()
            runs = list(run_all(jobs))
            found = summarize(runs, shlex.join(["python", "scripts/benchmark.py", *words]))
            write(found, runs, options.out)
    except (InputError, OSError) as error:
        sys.stderr.write(f"benchmark.py: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes the benchmark")
        return 128 + signal.SIGINT
    print(f"\n{markdown(found)}\nwritten to {options.out}/results.md, .csv and .json")
    return 1 if any(run.error for run in runs) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
