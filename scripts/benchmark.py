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
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from benchmark_results import BenchmarkRun, markdown, summarize
from jobs import (
    INPUTS,
    LOG,
    config_texts,
    copy_configs,
    describe_inputs,
    launch,
    note_inputs,
    output_folder,
    reason_of_failure,
    require_folder_names,
    require_idle,
    require_same_inputs,
)

from hlbgpt.runs.folder import RECORD, last_checkpoint
from hlbgpt.runs.record import read_record
from hlbgpt.utils.command import command
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import atomic_write, write_json

AS_IS = "as is"
MAX_SEEDS = 10_000
SET_BY_BENCHMARK = ("--seed_everything", "--ckpt_path", "--trainer.default_root_dir")


@dataclass(frozen=True)
class Job:
    """One run of the benchmark: a variant of a config with a seed."""

    variant: str
    seed: int
    arguments: list[str]  # of `hlbgpt fit`, but those of seed, folder and checkpoint
    texts: Mapping[str, str]  # of the config files among them, when the benchmark began
    folder: Path

    @property
    def words(self) -> list[str]:
        return [*self.arguments, f"--seed_everything={self.seed}"]

    @property
    def done(self) -> bool:
        return (self.folder / RECORD).is_file()

    def inputs(self) -> str:
        """What determines the result of the run, in JSON: arguments and texts of config files."""
        return describe_inputs(self.words, self.texts)

    def require_usable(self) -> None:
        """Raise InputError if the folder holds anything but a run of this job, or a busy one."""
        require_same_inputs(self.folder, self.inputs())
        if not (self.folder / INPUTS).is_file() and any(self.folder.glob("[!.]*")):
            raise InputError(
                f"--out: {self.folder} holds files that no benchmark has made, since it has no "
                f"{INPUTS}; name another folder, or remove that one"
            )
        if self.done:
            read_record(self.folder)
        else:
            require_idle(self.folder)


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
    if not 1 <= options.seeds <= MAX_SEEDS:
        raise InputError(f"--seeds: {options.seeds} is not between 1 and {MAX_SEEDS:,}")
    configs = {Path(config).stem: config for config in options.config}
    if len(set(map(str.casefold, configs))) < len(options.config):
        raise InputError("--config: two files have the same name; rename one")
    require_folder_names("--config", configs)
    variants = parse_variants(options.variant)
    require_folder_names("--variant", variants)
    for word in [*common, *(word for words in variants.values() for word in words)]:
        if word.partition("=")[0] in SET_BY_BENCHMARK:
            raise InputError(f"{word}: is set by the benchmark itself; leave it out")
    made = []
    for (stem, config), (name, extra) in product(configs.items(), variants.items()):
        arguments = ["--config", config, *common, *extra]
        folder = options.out / stem / _folder_name(name)
        made.append((f"{stem}, {name}", arguments, config_texts(arguments), folder))
    return [
        Job(name, seed, arguments, texts, folder / f"seed_{seed}")
        for seed, (name, arguments, texts, folder) in product(range(options.seeds), made)
    ]


def start(job: Job) -> str:
    """Start or resume a run and wait until it ends; returns why it failed, if it did."""
    require_idle(job.folder)
    resumes = (checkpoint := last_checkpoint(job.folder)).is_file()
    if not resumes:
        shutil.rmtree(job.folder, ignore_errors=True)
        job.folder.mkdir(parents=True)
        note_inputs(job.folder, job.inputs())
    words = ["fit", *copy_configs(job.words, job.texts, job.folder)]
    words += [f"--trainer.default_root_dir={job.folder}"]
    words += ["--ckpt_path", str(checkpoint)] if resumes else []
    log = job.folder / LOG
    log.write_text(f"$ {shlex.join(['hlbgpt', *words])}\n", "utf-8")
    code = launch(words, log)
    return reason_of_failure(log.read_text("utf-8", errors="replace").splitlines()[1:], code)


def run(job: Job) -> BenchmarkRun:
    """The result of a run, which is started or resumed unless it has ended."""
    found = BenchmarkRun(job.variant, job.seed, str(job.folder))
    error = None if job.done else start(job)
    if not job.done:
        return replace(found, error=error)
    record = read_record(job.folder)
    if record["value"] is None or record["validation"] is None:
        word = record.get("not_finite", {}).get("value")
        final = f"the final {record['monitor']} is {word}"
        return replace(found, error=final if word else "it ended without a validation")
    return replace(found, record=record)


@command("benchmark.py", needs_output=False, advice="the same command resumes the benchmark")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options, common = parse(words)
    jobs = make_jobs(options, common)
    with output_folder(options.out):
        for job in jobs:
            job.require_usable()
        runs = []
        for k, job in enumerate(jobs, start=1):
            print(f"[{k} of {len(jobs)}] {job.variant}, seed {job.seed}: ", end="", flush=True)
            runs.append(run(job))
            print(runs[-1].in_a_line(), flush=True)
        results = summarize(runs, shlex.join(["python", "scripts/benchmark.py", *words]))
        write_json(options.out / "results.json", results)
        with atomic_write(options.out / "results.md") as path:
            path.write_text(markdown(results), "utf-8")
    print(f"\n{markdown(results)}\nwritten to {options.out}/results.md and results.json")
    return 1 if any(run.error for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
