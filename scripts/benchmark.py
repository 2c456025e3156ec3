"""Run configs, and variants of them, over the same seeds, and compare what comes out.

    python scripts/benchmark.py --config configs/quickstart.yaml --seeds 3

Each config is run as it is and with the arguments of each `--variant "NAME: ARGUMENTS"`; what
follows `--` holds for all. All variants take their turn at a seed before the next one, so that a
machine that gets slower does so for all. The same command again goes on where it was cut short. In
--out it leaves results.md, results.csv, results.json and a folder for each run; the exit code is 1
if a run failed.
"""

import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from benchmark_jobs import Job, jobs, parse, require_same_as_before
from benchmark_results import Run, markdown, results, write

from hlbgpt.runs.checkpoint import load_checkpoint
from hlbgpt.runs.folder import CONFIG, RECORD, last_checkpoint
from hlbgpt.training.resume import KEY
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import locked

ERROR_LINE = re.compile(r"hlbgpt: error|[\w.]*(Error|Exception)\b")


def launch(words: list[str], log: Path) -> int:
    """Run hlbgpt in a process of its own, which is told to stop and waited for if we are."""
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


def run(job: Job) -> Run:
    """Start a run or go on with it, and wait for its end."""
    words = ["fit", *job.words, *job.places()]
    resumed = job.left_before().get("resumed", 0)
    checkpoint = last_checkpoint(job.run_folder)
    if checkpoint.is_file():
        resumed += 1
        try:
            step = load_checkpoint(checkpoint)[KEY]["log_step"]
        except InputError as error:
            return outcome(job, str(error))
        words += ["--ckpt_path", str(checkpoint), f"--trainer.logger.purge_step={step}"]
    else:
        resumed = 0
        shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    job.note(resumed)
    log = job.folder / "log.txt"
    with log.open("a") as file:
        file.write(f"$ {shlex.join(['hlbgpt', *words])}\n")
    begin = log.stat().st_size
    code = launch(words, log)
    return outcome(job, error_in(log.read_bytes()[begin:].decode(errors="replace"), code))


def error_in(log: str, code: int) -> str | None:
    """What a process that did not end well said last, of its error if it names one."""
    if code == 0:
        return None
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line)]
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return ": ".join([how, *(errors or lines)[-1:]])


def outcome(job: Job, error: str | None = None) -> Run:
    """What the run left in its folder."""
    path = job.run_folder / RECORD
    record: dict[str, Any] = {}
    settings: dict[str, Any] = {"trainer": {}, "time_to_target": {}}
    if path.is_file():
        record = json.loads(path.read_text())
        settings = yaml.safe_load((job.run_folder / CONFIG).read_text())
        error = without_value(record)  # it has got to its end, however the process did
    elif not error:
        error = f"no {RECORD} at {path}"
    return Run(
        variant=job.variant,
        seed=job.seed,
        folder=str(job.run_folder),
        command=shlex.join(["hlbgpt", "fit", *job.words]),
        resumed=job.left_before().get("resumed", 0),
        error=error,
        record={} if error else record,
        mode=settings["time_to_target"].get("mode", "min"),
        max_steps=settings["trainer"].get("max_steps", -1),
    )


def without_value(record: dict[str, Any]) -> str | None:
    """Why a run that has its record has no final value; None if it has."""
    if record["value"] is None:
        return "never validated; make trainer.val_check_interval smaller"
    return None if math.isfinite(record["value"]) else f"{record['monitor']} is {record['value']}"


def run_all(asked: Sequence[Job]) -> Iterator[Run]:
    """Run what has not been run, with a line for each."""
    missing = [job for job in asked if not (job.run_folder / RECORD).is_file()]
    spent: list[float] = []
    for k, job in enumerate(asked, start=1):
        print(f"[{k} of {len(asked)}] {job.variant}, seed {job.seed}: ", end="", flush=True)
        if job not in missing:
            found = outcome(job)
            print(f"kept: {_in_words(found)}")
        else:
            begun = time.monotonic()
            found = run(job)
            spent.append(time.monotonic() - begun)
            left = sum(spent) / len(spent) * (len(missing) - len(spent))
            to_go = f"; about {left / 60:.1f} min to go" if left else ""
            print(f"{_in_words(found)}{to_go}", flush=True)
        yield found


def _in_words(run: Run) -> str:
    if run.error:
        return f"FAILED, {run.error}"
    met = "met" if run.record["reached"] else "not met"
    return (
        f"{run.record['monitor']} {run.record['value']:.4f}, target {met}, "
        f"{run.record['train_seconds']:.1f} s of training"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options, common = parse(words, (__doc__ or "").splitlines()[0])
        asked = jobs(options, common)
        options.out.mkdir(parents=True, exist_ok=True)
        with locked(options.out, wait=False) as held:
            if not held:
                raise InputError(f"--out: another benchmark is running in {options.out}; wait")
            for job in asked:
                require_same_as_before(job)
            runs = list(run_all(asked))
            found = results(runs, shlex.join(["python", "scripts/benchmark.py", *words]))
            write(found, runs, options.out)
    except InputError as error:
        sys.stderr.write(f"benchmark: error: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"benchmark: error: --out: {error}\n")
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        return 128 + signal.SIGINT
    print(f"\n{markdown(found)}\nwritten to {options.out}/results.md, .csv and .json")
    return 1 if any(run.error for run in runs) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
