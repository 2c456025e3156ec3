"""Run configs, and variants of them, with the same seeds, and compare the results.

    python scripts/benchmark.py --config configs/quickstart.yaml --seeds 3 \\
        --variant "no warm-up: --model.lr_scheduler.pct_start 0.001" -- --trainer.max_steps=500

Each config is run as it is and with the arguments of each --variant. Arguments after -- are given
to all runs. All variants run with one seed before the next seed starts, so that a machine that
slows down affects all variants alike. The same command resumes an interrupted benchmark. A run's
folder is OUT/<config>/<variant>/seed_N, and output.log in it holds what the run prints. Results
are in OUT/results.md and OUT/results.json. The exit code is 1 if a run failed.
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from benchmark_results import BenchmarkRun, markdown, summarize

from hlbgpt.runs.folder import RECORD, last_checkpoint
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import atomic_write, locked, write_json

AS_IS = "as is"
INPUTS = "inputs.json"  # in a run's folder: the inputs that it was made from
SET_BY_BENCHMARK = ("--seed_everything", "--ckpt_path", "--trainer.default_root_dir")


@dataclass(frozen=True)
class Job:
    """One run of the benchmark: a variant of a config with a seed."""

    variant: str
    seed: int
    arguments: list[str]  # of `hlbgpt fit`, except for those that set folder and checkpoint
    folder: Path

    @property
    def done(self) -> bool:
        return (self.folder / RECORD).is_file()

    def inputs(self) -> str:
        """What determines the result of the run, in JSON: arguments and texts of config files."""
        paths = [Path(argument.rpartition("=")[2]) for argument in self.arguments]
        texts = {str(p): p.read_text("utf-8") for p in paths if p.suffix == ".yaml" and p.is_file()}
        return json.dumps({"arguments": self.arguments, "configs": texts}, indent=2)

    def require_same_inputs(self) -> None:
        """Raise InputError if the folder holds a run that was made from other inputs."""
        noted = self.folder / INPUTS
        if noted.is_file() and noted.read_text("utf-8") != self.inputs():
            raise InputError(
                f"--out: {self.folder} holds a run with other arguments or another text of its "
                "config; name another folder, or remove that one"
            )


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
    parser.add_argument("--out", type=Path, default="runs/benchmark", help="(default: %(default)s)")
    return parser.parse_args(words[:split]), list(words[split + 1 :])


def parse_variants(given: Sequence[str]) -> dict[str, list[str]]:
    """Arguments of each variant by its name; the first is the config as it is."""
    variants: dict[str, list[str]] = {AS_IS: []}
    for text in given:
        match = re.fullmatch(r"\s*(\w[\w .+=-]*?)\s*:\s*(\S.*)", text)
        if match is None:
            raise InputError(
                f"--variant: {text!r} is not 'NAME: ARGUMENTS'; begin it with a name of letters, "
                "digits, spaces and .+=-_"
            )
        name, arguments = match.groups()
        if _folder_name(name) in map(_folder_name, variants):
            raise InputError(f"--variant: the name {name!r} is taken; choose another")
        try:
            variants[name] = shlex.split(arguments)
        except ValueError as error:
            raise InputError(f"--variant: {text!r}: {error}; correct it") from error
    return variants


def _folder_name(variant: str) -> str:
    return variant.casefold().replace(" ", "_")


def make_jobs(options: argparse.Namespace, common: Sequence[str]) -> list[Job]:
    """All runs in the order in which they run; raises InputError if an option is invalid."""
    if options.seeds < 1:
        raise InputError(f"--seeds: {options.seeds} is less than 1; set it to at least 1")
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
    for seed, (stem, config), (name, extra) in product(
        range(options.seeds), configs.items(), variants.items()
    ):
        arguments = ["--config", config, *common, *extra, f"--seed_everything={seed}"]
        folder = options.out / stem / _folder_name(name) / f"seed_{seed}"
        jobs.append(Job(f"{stem}, {name}", seed, arguments, folder))
    return jobs


def launch(
    words: list[str],
    log: Path,
    *,
    program: Sequence[str] = ("-m", "hlbgpt"),
    environment: dict[str, str] | None = None,
) -> int:
    """Run a program in its own process; an interrupt stops it gracefully. Returns the exit code.

    `program` is what Python runs, `environment` is added to that of this process.
    """
    with log.open("ab") as file:
        command, env = [sys.executable, *program, *words], os.environ | (environment or {})
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise


def start(job: Job) -> str:
    """Start or resume a run and wait until it ends; returns why it failed, if it did."""
    words = ["fit", *job.arguments, f"--trainer.default_root_dir={job.folder}"]
    if (checkpoint := last_checkpoint(job.folder)).is_file():
        words += ["--ckpt_path", str(checkpoint)]
    else:
        shutil.rmtree(job.folder, ignore_errors=True)
        job.folder.mkdir(parents=True)
        (job.folder / INPUTS).write_text(job.inputs(), "utf-8")
    log = job.folder / "output.log"
    log.write_text(f"$ {shlex.join(['hlbgpt', *words])}\n", "utf-8")
    code = launch(words, log)
    return reason_of_failure(log.read_text("utf-8", errors="replace").splitlines()[1:], code)


def reason_of_failure(lines: Sequence[str], code: int) -> str:
    """The exit code of a process, and its last error message or else its last line."""
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if re.match(r"hlbgpt: error|[\w.]*(Error|Exception)\b", line)]
    reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return ": ".join([reason, *(errors or lines)[-1:]])


def run(job: Job) -> BenchmarkRun:
    """The result of a run, which is started or resumed unless it has ended."""
    found = BenchmarkRun(job.variant, job.seed, str(job.folder))
    error = None if job.done else start(job)
    if not job.done:
        return replace(found, error=error)
    record = json.loads((job.folder / RECORD).read_text("utf-8"))
    if record["value"] is None or not math.isfinite(record["value"]):
        return replace(found, error=f"the final {record['monitor']} is {record['value']}")
    return replace(found, record=record)


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
            runs = []
            for k, job in enumerate(jobs, start=1):
                print(f"[{k} of {len(jobs)}] {job.variant}, seed {job.seed}: ", end="", flush=True)
                runs.append(run(job))
                print(runs[-1].in_a_line(), flush=True)
            results = summarize(runs, shlex.join(["python", "scripts/benchmark.py", *words]))
            write_json(options.out / "results.json", results)
            with atomic_write(options.out / "results.md") as path:
                path.write_text(markdown(results), "utf-8")
    except (InputError, OSError) as error:
        sys.stderr.write(f"benchmark.py: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes the benchmark")
        return 128 + signal.SIGINT
    print(f"\n{markdown(results)}\nwritten to {options.out}/results.md and results.json")
    return 1 if any(run.error for run in runs) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
