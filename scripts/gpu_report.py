"""Measure this project on a GPU in one command, and write a report to send.

    python scripts/gpu_report.py --out runs/gpu_report --quick

The stages in their order: `hardware`, `gradients` of the compiled network against float32, `steps`,
cold and warm `start`, `speedruns`, and a `race`, in which the speedrun has to reach the loss that
its rival ended with. Arguments after -- are given to all runs of `hlbgpt fit`.

Each stage runs in processes of its own, in OUT/<stage>; a process that fails is reported, and the
others go on. The same command continues where it was stopped and repeats what failed; --only runs
the named stages, also again. The report is OUT/report.md. The exit code is 1 if a process failed.
"""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from benchmark import SET_BY_BENCHMARK
from gpu_report_text import RESULTS, read_result, read_results, write_report
from jobs import (
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

from hlbgpt.cli.main import build
from hlbgpt.optim.schedules import plan_steps
from hlbgpt.utils.command import command
from hlbgpt.utils.errors import InputError

CONFIGS = ("configs/speedrun.yaml", "configs/hlb041.yaml")
MEASURE = Path(__file__).with_name("gpu_measure.py")


@dataclass(frozen=True)
class Job:
    """A process that leaves its result in a folder of its own: OUT/<stage>/<name>."""

    folder: Path
    program: tuple[str, ...]  # what Python runs
    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def result(self) -> dict[str, Any] | None:
        """What the process has measured, or the record of its run; None if it has not ended."""
        return read_result(self.folder / RESULTS[self.folder.parent.name])

    def run(self) -> str | None:
        """Run the process from the start; returns why it failed, if it did."""
        require_idle(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        log = self.folder / LOG
        log.write_text(f"$ {shlex.join(['python', *self.program, *self.words])}\n", "utf-8")
        code = launch(self.words, log, program=self.program, environment=self.environment)
        if self.result is not None:
            return None
        lines = log.read_text("utf-8", errors="replace").splitlines()[1:]
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{reason_of_failure([], code)}\n")
        return reason_of_failure(lines, code)


@dataclass(frozen=True)
class Report:
    """What is measured, and where the results go."""

    out: Path
    recipe: Path
    rival: Path
    device: str
    quick: bool
    extra: list[str]  # arguments of `hlbgpt fit`

    def on_copies(self) -> "Report":
        """The report with copies of its configs, so that edits do not reach what runs later.

        Raises InputError if OUT holds results of other inputs.
        """
        configs = ["--config", str(self.recipe), "--config", str(self.rival), *self.extra]
        texts, options = config_texts(configs), [self.device, "quick" if self.quick else "full"]
        inputs = describe_inputs([*configs, *options], texts)
        require_same_inputs(self.out, inputs)
        note_inputs(self.out, inputs)
        _, recipe, _, rival, *extra = copy_configs(configs, texts, self.out)
        return replace(self, recipe=Path(recipe), rival=Path(rival), extra=extra)

    @property
    def seeds(self) -> range:
        return range(1 if self.quick else 2)

    def fit_words(self, config: Path) -> list[str]:
        return ["--config", str(config), f"--trainer.accelerator={self.device}", *self.extra]

    def measure(self, stage: str, config: Path, *words: str, variant: str = "") -> Job:
        """A stage of gpu_measure.py, for a config or a variant of it by further words."""
        folder = self.out / stage / f"{config.stem}{variant}"
        own = [stage, "--out", str(folder), "--repeat", "5" if self.quick else "20", "--"]
        return Job(folder, (os.path.relpath(MEASURE),), [*own, *self.fit_words(config), *words])

    def fit(self, folder: str, config: Path, *words: str, **environment: str) -> Job:
        """A run of `hlbgpt fit`, which keeps no checkpoints."""
        path = self.out / folder
        own = ["--trainer.enable_checkpointing=false", f"--trainer.default_root_dir={path}"]
        words = ("fit", *self.fit_words(config), *own, *words)
        return Job(path, ("-m", "hlbgpt"), list(words), environment)


def steps(report: Report) -> Iterator[Job]:
    """The recipe's steps, also without its own kernel if it has one, and the rival's."""
    yield report.measure("steps", report.recipe)
    built = build(report.fit_words(report.recipe), device="meta")
    if built.config.model.net.init_args.get("fused_mlp"):
        plain = "--model.net.init_args.fused_mlp=false"
        yield report.measure("steps", report.recipe, plain, variant="_plain_mlp")
    yield report.measure("steps", report.rival)


def start(report: Report) -> Iterator[Job]:
    """A few steps with an empty compile cache, and again with what these have left there."""
    cache = (report.out / "start" / "cold" / "cache").resolve()
    few = ("--trainer.max_steps=3", "--trainer.limit_val_batches=1")
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    cold = report.fit("start/cold", report.recipe, *few, **caches)
    yield cold
    if cold.result is not None:
        yield report.fit("start/warm", report.recipe, *few, **caches)


def speedruns(report: Report) -> Iterator[Job]:
    """The recipe with each seed; only a quarter of its steps if the report is quick."""
    part = []
    if report.quick:
        built = build(report.fit_words(report.recipe), device="meta")
        table, count = built.schedule.table, built.config.trainer.max_steps
        count = len(plan_steps(table, micro_batch_tokens=1)) if table else count
        part = [f"--trainer.max_steps={max(1, count // 4)}"]
    for seed in report.seeds:
        name = f"speedruns/{report.recipe.stem}_{seed}"
        yield report.fit(name, report.recipe, f"--seed_everything={seed}", *part)


def race(report: Report) -> Iterator[Job]:
    """For each seed the rival to its end, then the recipe to the loss that the rival reached."""
    for seed in report.seeds:
        by_seed = f"--seed_everything={seed}"
        rival = report.fit(f"race/{report.rival.stem}_{seed}", report.rival, by_seed)
        yield rival
        if (record := rival.result) and record["value"] is not None:
            target = f"--time_to_target.target={record['value']}"
            yield report.fit(f"race/{report.recipe.stem}_{seed}", report.recipe, by_seed, target)


STAGES: dict[str, Callable[[Report], Iterable[Job]]] = {
    "hardware": lambda report: [report.measure("hardware", report.recipe)],
    "gradients": lambda report: [report.measure("gradients", report.recipe)],
    "steps": steps,
    "start": start,
    "speedruns": speedruns,
    "race": race,
}


def run_stage(report: Report, stage: str, *, again: bool) -> int:
    """Run what a stage lacks, or all of it `again`; returns how many processes failed."""
    failed = 0
    if again:
        shutil.rmtree(report.out / stage, ignore_errors=True)
    for job in STAGES[stage](report):
        print(f"{job.folder}: ", end="", flush=True)
        if job.result is not None:
            print("kept")
            continue
        reason = job.run()
        failed += reason is not None
        print("done" if reason is None else f"FAILED, {reason}", flush=True)
    return failed


def parse(words: Sequence[str]) -> tuple[Report, list[str]]:
    """The report that `words` ask for, and the stages to run; raises InputError if they cannot."""
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out", type=Path, default="runs/gpu_report", help="(default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=STAGES, default=[], help="stages to run")
    parser.add_argument("--quick", action="store_true", help="one seed, and less of everything")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try it")
    parser.add_argument(
        "--config", action="append", default=[], help="first the recipe, then its rival"
    )
    options, extra = parser.parse_args(words[:split]), list(words[split + 1 :])
    if len(options.config) > 2:
        raise InputError("--config: more than two; give the recipe, then its rival")
    recipe, rival = map(Path, [*options.config, *CONFIGS[len(options.config) :]])
    require_folder_names("--config", [recipe.stem, rival.stem])
    if recipe.stem == rival.stem:
        raise InputError("--config: the recipe and its rival have the same name; rename one")
    for word in extra:
        if word.partition("=")[0] in SET_BY_BENCHMARK:
            raise InputError(f"{word}: is set by the report itself; leave it out")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"--device: torch {torch.__version__} finds no CUDA GPU; install a CUDA build of torch "
            "and its driver, or try the command with --device cpu and small configs"
        )
    report = Report(options.out, recipe, rival, options.device, options.quick, extra)
    for config in (recipe, rival):
        build(report.fit_words(config), device="meta")
    return report, options.only


@command("gpu_report.py", needs_output=False, advice="the same command goes on from here")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages and write the report; returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    report, only = parse(words)
    with output_folder(report.out):
        report = report.on_copies()
        for stage in STAGES:  # broken ones are found before anything runs
            if stage not in only:
                read_results(report.out, stage)
        try:
            stages = [stage for stage in STAGES if not only or stage in only]
            failed = [run_stage(report, stage, again=stage in only) for stage in stages]
        finally:
            asked = shlex.join(["python", "scripts/gpu_report.py", *words])
            write_report(report.out, report.recipe.stem, report.rival.stem, asked)
            print(f"written to {report.out}/report.md")
    return 1 if any(failed) else 0


if __name__ == "__main__":
    sys.exit(main())
