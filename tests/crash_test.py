"""Kill a training run again and again, resume it each time, and compare how it ends.

    python tests/crash_test.py --kills 100

A short run is trained once without interruption. Then it is trained again and again, stopped at
random moments, mostly by SIGKILL, which nothing can catch, and resumed with `--ckpt_path last`.
After each stop the checkpoint must load and match its checksums; each run that gets to its end
must have the weights, optimizer, clock and curves of the first. POSIX only.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NoReturn

import torch

from hlbgpt.__main__ import main as hlbgpt
from hlbgpt.runs import load_checkpoint
from hlbgpt.runs.logger import HEADLINE, RESULT, scalars

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
RUN = Path("runs/quickstart/version_0")
LAST = RUN / "checkpoints" / "last.ckpt"
EXIT_CODES = {int(signal.SIGTERM): 143, int(signal.SIGINT): 130}


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


def start(words: list[str], folder: Path) -> int:
    """Run a command line in a process of its own; forked, which spares it the imports."""
    child = os.fork()
    if child == 0:
        _run(words, folder)
    return child


def _run(words: list[str], folder: Path) -> NoReturn:
    code = 1
    torch.set_num_threads(1)  # so small a network trains no slower
    try:
        os.chdir(folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        hlbgpt(words)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def outcome(folder: Path) -> dict[str, Any]:
    """All that must not depend on how often a run was stopped."""
    checkpoint = load_checkpoint(folder / LAST)
    return {
        "weights": checkpoint["state_dict"],
        "optimizer": checkpoint["optimizer_states"],
        "schedule": checkpoint["lr_schedulers"],
        "step": checkpoint["global_step"],
        "loader": checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"],
        "hlbgpt": checkpoint["hlbgpt"],  # tokens, FLOPs, random state
        "curves": curves(folder / RUN),
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
    """Stops runs, and counts what happened."""

    def __init__(self, words: list[str], seconds: float, seed: int) -> None:
        self.words, self.seconds = words, seconds
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()

    def stop_once(self, place: Path) -> bool:
        """Start or resume the run in `place` and stop it after a while; True if it ended before."""
        resumed = (place / LAST).is_file()
        last = ["fit", "--ckpt_path", "last"]
        clock = _train_seconds(place)
        child = start(last if resumed else self.words, place)
        signum = self.random.choices(
            [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], weights=[8, 1, 1]
        )[0]
        deadline = time.monotonic() + self.random.uniform(0, self.seconds)
        in_write = self.random.random() < 0.4  # then at the next checkpoint, in the middle of it
        while time.monotonic() < deadline or (in_write and not _is_writing(place)):
            if os.waitpid(child, os.WNOHANG)[0]:
                return True
            time.sleep(0.0005)
        os.kill(child, signum)
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return True
        self._check_after_stop(place, signum, status, resumed)
        assert _train_seconds(place) >= clock, "the clock went back"
        return False

    def _check_after_stop(self, place: Path, signum: int, status: int, resumed: bool) -> None:
        name = signal.Signals(signum).name
        self.counts[f"stopped by {name}"] += 1
        self.counts["after a resume"] += resumed
        if os.WIFEXITED(status) and (code := os.WEXITSTATUS(status)) != EXIT_CODES.get(signum):
            sys.exit(f"exit code {code} after {name}:\n{(place / 'log.txt').read_text()}")
        if _is_writing(place):
            self.counts["while a checkpoint was written"] += 1
        if (place / LAST).is_file():
            load_checkpoint(place / LAST)  # raises unless it is whole
        else:
            self.counts["before the first checkpoint"] += 1
            for run in (place / "runs").glob("*/version_*"):  # to be started anew
                run.rename(place / f"without_checkpoint_{time.monotonic_ns()}")


def _train_seconds(place: Path) -> float:
    if not (place / LAST).is_file():
        return 0.0
    return load_checkpoint(place / LAST)["callbacks"]["TimeToTarget"]["train_seconds"]


def _is_writing(place: Path) -> bool:
    """Whether a checkpoint is half written."""
    return any(place.glob(f"{LAST.parent}/.*.tmp"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="stops in total")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = arguments(_write_text(folder / "text"), options.steps)
        (folder / "whole").mkdir()
        for _ in range(2):  # the second time without tokenizing: that is the pace
            begun = time.monotonic()
            if os.waitpid(start(words, folder / "whole"), 0)[1]:
                sys.exit((folder / "whole" / "log.txt").read_text())
            seconds = time.monotonic() - begun
        whole = outcome(folder / "whole")
        crashes = Crashes(words, seconds, options.seed)
        finished = stops = 0
        while stops < options.kills:
            place = folder / f"run_{finished}"
            place.mkdir(exist_ok=True)
            if not crashes.stop_once(place):
                stops += 1
                continue
            if found := difference(whole, outcome(place)):
                sys.exit(f"run {finished} ended otherwise: {found}")
            assert (place / RUN / "record.json").is_file()
            assert [path.name for path in (place / RUN).parent.iterdir()] == ["version_0"]
            finished += 1
        print(f"{stops} stops; {finished} runs got to their end, all of them equal")
        print(", ".join(f"{count} {what}" for what, count in sorted(crashes.counts.items())))
        print(f"an uninterrupted run takes {seconds:.1f} s")


if __name__ == "__main__":
    main()
