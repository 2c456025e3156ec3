"""Stop a training run again and again, resume it each time, and compare how it ends.

    python tests/crash_test.py --kills 100

A short run is trained once without interruption. Then it is trained again and again, stopped at
random moments, mostly by SIGKILL, which nothing can catch, also by other signals and by closing its
terminal, and resumed with `--ckpt_path last`. Closing the pipe that takes its output must not stop
it. After each stop the checkpoint must load and match its checksums; each run that gets to its end
must have the weights, optimizer, clock and curves of the first. One stop in twenty hits
scripts/benchmark.py instead, which is started again. POSIX only.
"""

import argparse
import contextlib
import math
import os
import pty
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NoReturn

import torch

from hlbgpt.__main__ import main as hlbgpt
from hlbgpt.runs import load_checkpoint
from hlbgpt.runs.logger import HEADLINE, RESULT, scalars

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
RUN = Path("runs/quickstart/version_0")
LAST = RUN / "checkpoints" / "last.ckpt"
# How a run is stopped, how often, and its exit code if it ends by itself.
TERMINAL, PIPE = "a closed terminal", "a closed pipe"
STOPS = {
    "SIGKILL": (8, None),
    "SIGTERM": (1, 143),
    "SIGINT": (1, 130),
    "SIGHUP": (1, 129),
    TERMINAL: (1, 129),
    PIPE: (1, 141),
}


def arguments(text: Path, steps: int) -> list[str]:
    """A small run of two micro-batches a step that saves a checkpoint every few steps."""
    sources = [f"--data.source.{split}={text / split}" for split in ("train", "validation")]
    return [
        "fit",
        *("--config", str(CONFIG)),
        "--data.source=hlbgpt.data.TextFiles",
        *sources,
        f"--data.cache_dir={text / 'cache'}",
        *("--data.sequence_length=32", "--data.eval_sequence_length=32"),
        *("--data.eval_batch_size=60", "--data.micro_batch_size=16", "--data.micro_batches=2"),
        *("--model.net.init_args.width=32", "--model.net.init_args.num_heads=2"),
        f"--trainer.max_steps={steps}",
        *("--trainer.val_check_interval=4", "--trainer.num_sanity_val_steps=0"),
        *("--trainer.log_every_n_steps=3", "--checkpoint.every_minutes=0.0005"),
        "--time_to_target.verbose=false",
        "--trainer.callbacks=[]",
    ]


def _write_text(folder: Path) -> Path:
    folder.mkdir()
    text = "\n".join(topics[topic] for topic in sorted(topics))
    (folder / "train").write_text(text[:12_000])
    (folder / "validation").write_text(text[20_000:21_800])
    return folder


def start(
    words: list[str], folder: Path, how: str = "", main: Callable[[list[str]], Any] = hlbgpt
) -> tuple[int, int]:
    """Run a command line in a process of its own; forked, which spares it the imports.

    Returns its id, and the file from which its terminal or pipe is read; -1 if it has neither.
    """
    reader, writer = os.pipe() if how == PIPE else (-1, -1)
    child, terminal = pty.fork() if how == TERMINAL else (os.fork(), -1)
    if child == 0:
        _run(words, folder, main, 1 if how == TERMINAL else writer)
    if writer != -1:
        os.close(writer)
    output = max(reader, terminal)
    if output != -1:
        os.set_blocking(output, False)
    return child, output


def _run(words: list[str], folder: Path, main: Callable[[list[str]], Any], out: int) -> NoReturn:
    code = 1
    torch.set_num_threads(1)  # so small a network trains no slower
    try:
        os.chdir(folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log if out == -1 else out, 1)
        os.dup2(log, 2)
        code = main(words) or 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def drain(output: int) -> None:
    """Read what a process has printed, so that it need not wait."""
    with contextlib.suppress(OSError):  # no more for now
        while output != -1 and os.read(output, 65536):
            pass


def outcome(run: Path) -> dict[str, Any]:
    """All that must not depend on how often the run in a folder was stopped."""
    checkpoint = load_checkpoint(run / "checkpoints" / "last.ckpt")
    return {
        "weights": checkpoint["state_dict"],
        "optimizer": checkpoint["optimizer_states"],
        "schedule": checkpoint["lr_schedulers"],
        "step": checkpoint["global_step"],
        "loader": checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"],
        "hlbgpt": checkpoint["hlbgpt"],  # tokens, FLOPs, random state
        "curves": curves(run),
    }


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every curve as TensorBoard shows it, but those that measure time."""
    found = {}
    for name, points in scalars(run).items():
        if any(word in name for word in ("second", "memory", "mfu")):
            continue
        if name.startswith((RESULT, HEADLINE)):  # twice if killed before the record was written
            points = points[-1:]
        found[name] = [(point.step, point.value) for point in points]
    return found


def difference(ours: Any, theirs: Any, where: str = "") -> str | None:
    """Where two outcomes differ first; None if they are equal to the last bit."""
    if isinstance(ours, torch.Tensor):
        return None if torch.equal(ours, theirs) else where
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            return f"{where}: {sorted(ours.keys() ^ theirs.keys())}"
        pairs = [(f"{where}.{key}", value, theirs[key]) for key, value in ours.items()]
    elif isinstance(ours, (list, tuple)):
        if len(ours) != len(theirs):
            return f"{where} (length {len(ours)} and {len(theirs)})"
        pairs = [(f"{where}.{i}", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    else:
        return None if ours == theirs else f"{where}: {ours} and {theirs}"
    return next((found for w, a, b in pairs if (found := difference(a, b, w))), None)


class Crashes:
    """Runs that are stopped, counted by what happened to them.

    Attributes:
        whole: What the first run that was not stopped has left.
        finished: How many runs have got to their end.
        seconds: About how long one takes, within which it is stopped; infinity to let it end.
    """

    def __init__(self, words: list[str], folder: Path, seed: int) -> None:
        self.words, self.folder = words, folder
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.whole: dict[str, Any] = {}
        self.finished, self.seconds = 0, math.inf

    @property
    def place(self) -> Path:
        """Where the run that is to be stopped is started."""
        return self.folder / f"{type(self).__name__}_{self.finished}"

    @property
    def run(self) -> Path:
        """The folder of that run."""
        return self.place / RUN

    def stop_once(self) -> bool:
        """Start or resume the run and stop it after a while; True if it has ended."""
        raise NotImplementedError

    def stop(self, times: int) -> None:
        """Stop runs so many times in all, and let the last one end."""
        self.finish()
        begun = time.monotonic()
        self.finish()  # without tokenizing: that is the pace to begin with
        self.seconds = time.monotonic() - begun
        while times:
            self.place.mkdir(exist_ok=True)
            if self.stop_once():
                self.compare()
                self.seconds *= 0.9
            else:
                times -= 1
                self.seconds *= 1.05  # so that one in three ends, whatever else the machine does
        self.seconds = math.inf
        self.finish()

    def finish(self) -> None:
        """Let the run get to its end."""
        self.place.mkdir(exist_ok=True)
        if not self.stop_once():
            sys.exit(f"the run in {self.place} has not got to its end")
        self.compare()

    def compare(self) -> None:
        """Exit unless the run has ended as the first one did."""
        found = outcome(self.run)
        self.whole = self.whole or found
        if where := difference(self.whole, found):
            sys.exit(f"{self.run} ended otherwise: {where}")
        assert (self.run / "record.json").is_file()
        assert len([path for path in self.run.parent.iterdir() if path.is_dir()]) == 1
        self.finished += 1


class RunCrashes(Crashes):
    """`hlbgpt fit`, forked, and resumed with `--ckpt_path last`."""

    def stop_once(self) -> bool:
        resumed, clock = (self.place / LAST).is_file(), _train_seconds(self.place)
        weights = [weight for weight, _ in STOPS.values()]
        how = self.random.choices(list(STOPS), weights=weights)[0]
        words = ["fit", "--ckpt_path", "last"] if resumed else self.words
        printed = _size(self.place / "log.txt")
        child, output = start(words, self.place, how)
        status = self._wait(child, output)
        if status is None:
            self.counts[f"hit by {how}"] += 1
            self.counts["after a resume"] += resumed
            if output == -1:
                os.kill(child, getattr(signal, how))
            else:
                os.close(output)
            status = os.waitpid(child, 0)[1]
        elif output != -1:
            os.close(output)
        ended = (self.run / "record.json").exists()
        begun = _size(self.place / "log.txt") > printed  # else nothing handles signals yet
        if begun or not os.WIFSIGNALED(status):
            self._check_code(how, status, ended)
        if not ended:
            self._check_after_stop(how)
            assert _train_seconds(self.place) >= clock, "the clock went back"
        return ended

    def _wait(self, child: int, output: int) -> int | None:
        """Wait until the run is to be stopped; the status if it ended before."""
        deadline = time.monotonic() + self.random.uniform(0, self.seconds)
        in_write = self.random.random() < 0.4  # then at the next checkpoint, in the middle of it
        while time.monotonic() < deadline or (in_write and not _is_writing(self.place)):
            drain(output)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status
            time.sleep(0.0005)
        return None

    def _check_code(self, how: str, status: int, ended: bool) -> None:
        """The exit code says what stopped the run, if it is not by SIGKILL."""
        if how == "SIGKILL" and os.WIFSIGNALED(status):
            return
        code, allowed = os.waitstatus_to_exitcode(status), [STOPS[how][1]]
        if ended:  # which its last words may not have told
            allowed += [0, 2] if how == TERMINAL else [0]
        if code not in allowed or (how == PIPE and not ended):
            log = (self.place / "log.txt").read_text()
            sys.exit(f"exit code {code} after {how}, in {self.place}:\n{log}")

    def _check_after_stop(self, how: str) -> None:
        if _is_writing(self.place):
            self.counts["while a checkpoint was written"] += 1
        if (self.place / LAST).is_file():
            load_checkpoint(self.place / LAST)  # raises unless it is whole
            return
        self.counts["before the first checkpoint"] += 1
        if (left := self.place / "runs").exists():
            if how != "SIGKILL":
                found = sorted(str(path) for path in left.rglob("*"))
                sys.exit(f"{how} before the first step has left {found} in {self.place}")
            left.rename(self.place / f"without_checkpoint_{time.monotonic_ns()}")


class BenchmarkCrashes(Crashes):
    """scripts/benchmark.py, whose run is a process of its own."""

    @property
    def run(self) -> Path:
        return self.place / "out" / "quickstart" / "as_is" / "seed_0"

    def stop_once(self) -> bool:
        how = self.random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
        deadline = time.monotonic() + self.random.uniform(0, self.seconds)
        begun, child = time.monotonic(), self._start()
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended and self._is_over(status):
                return True
            if ended:
                begun, child = time.monotonic(), self._start()
            time.sleep(0.01)
        os.kill(child, how)
        status = os.waitpid(child, 0)[1]
        early = time.monotonic() - begun < 0.2  # nothing handles signals yet
        allowed = (-signal.SIGKILL, 128 + how, *([-how] if early else []))
        if os.waitstatus_to_exitcode(status) not in allowed:
            self._is_over(status)  # it ended by itself at the same moment
        self.counts[f"benchmark.py hit by {how.name}"] += 1
        return (self.place / "out" / "results.json").exists()

    def _start(self) -> int:
        from benchmark import main  # needs scipy

        words = ["--config", str(CONFIG), "--seeds=1", "--out=out", "--", *self.words[3:]]
        return start(words, self.place, main=main)[0]

    def _is_over(self, status: int) -> bool:
        """Whether the benchmark has ended; else the run of an earlier one still goes on."""
        if (code := os.waitstatus_to_exitcode(status)) == 0:
            return True
        log = (self.place / "log.txt").read_text()
        if code != 2 or "still going on" not in log.splitlines()[-1]:
            sys.exit(f"exit code {code} of benchmark.py:\n{log}")
        self.counts["benchmark.py had to wait"] += 1
        time.sleep(0.3)
        return False


def _train_seconds(place: Path) -> float:
    if not (place / LAST).is_file():
        return 0.0
    return load_checkpoint(place / LAST)["callbacks"]["TimeToTarget"]["train_seconds"]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_writing(place: Path) -> bool:
    """Whether a checkpoint is half written."""
    return any(place.glob(f"{LAST.parent}/.*.tmp"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="stops in total")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    options = parser.parse_args()
    of_benchmark = options.kills // 20
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = arguments(_write_text(folder / "text"), options.steps)
        runs = RunCrashes(words, folder, options.seed)
        runs.stop(options.kills - of_benchmark)
        benchmarks = BenchmarkCrashes(words, folder, options.seed)
        benchmarks.whole = runs.whole
        if of_benchmark:
            benchmarks.stop(of_benchmark)
    finished = runs.finished + benchmarks.finished
    print(f"{options.kills} stops; {finished} runs got to their end, all of them equal")
    counts = sorted((runs.counts + benchmarks.counts).items())
    print(", ".join(f"{count} {what}" for what, count in counts))


if __name__ == "__main__":
    main()
