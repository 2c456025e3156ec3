"""A benchmark that is killed, as where memory runs out, and started again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import QUICKSTART
from helpers import read_record

pytest.importorskip("scipy")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]
SCRIPTS = Path(__file__).parents[1] / "scripts"
SEED_0 = Path("quickstart/as_is/seed_0")
LONGER = [
    *("--trainer.max_steps=400", "--trainer.val_check_interval=100", "--trainer.callbacks=[]"),
    *("--time_to_target.target=0", "--checkpoint.every_minutes=0.001"),
]
HERE = ["benchmark.py"]
# As on a system that does not end children with their parent.
ELSEWHERE = ["-c", "import benchmark, jobs; jobs._LIBC = None; raise SystemExit(benchmark.main())"]


def command(program: list[str], out: Path, tiny: list[str]) -> list[str]:
    options = [*QUICKSTART, "--seeds", "1", "--out", str(out)]
    return [sys.executable, *program, *options, "--", *tiny, *LONGER]


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def importing(folder: Path, pid: int) -> bool:
    """Whether the run has begun to import torch."""
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def training(folder: Path, pid: int) -> bool:
    return (folder / "checkpoints" / "last.ckpt").is_file()


When = Callable[[Path, int], bool]


def kill(words: list[str], out: Path, when: When) -> int:
    """Start a benchmark and kill it as soon as `when` is true; returns the id of its run."""
    benchmark = subprocess.Popen(words, cwd=SCRIPTS)
    wait_for(lambda: children(benchmark.pid))
    (run,) = children(benchmark.pid)
    wait_for(lambda: when(out / SEED_0, run))
    benchmark.kill()
    benchmark.wait()
    return run


def finish(words: list[str]) -> tuple[int, str]:
    done = subprocess.run(words, cwd=SCRIPTS, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("when", [importing, training])
def test_a_run_ends_with_its_benchmark(when: When, tiny: list[str], tmp_path: Path) -> None:
    words = command(HERE, tmp_path / "killed", tiny)
    run = kill(words, tmp_path / "killed", when)
    wait_for(lambda: not is_alive(run), seconds=60)
    assert not (tmp_path / "killed" / SEED_0 / "record.json").exists()
    assert finish(words) == (0, "")
    assert finish(command(HERE, tmp_path / "whole", tiny)) == (0, "")
    found, whole = (read_record(tmp_path / name / SEED_0) for name in ("killed", "whole"))
    assert all(found[key] == whole[key] for key in ("value", "step", "tokens"))


@pytest.mark.parametrize("when", [importing, training])
def test_a_run_that_goes_on_is_left_alone(when: When, tiny: list[str], tmp_path: Path) -> None:
    words = command(ELSEWHERE, tmp_path, tiny)
    run = kill(words, tmp_path, when)
    try:
        os.kill(run, signal.SIGSTOP)  # so that it does not end meanwhile
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        code, message = finish(words)
        assert code == 2
        held = f"--out: the run in {tmp_path / SEED_0} is still going on in another process"
        assert message.startswith(f"benchmark.py: error: {held}")
        assert len(message.splitlines()) == 1
        ours = {tmp_path / ".lock", tmp_path / SEED_0 / ".lock"}
        after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert {path for path in before | after if before.get(path) != after.get(path)} <= ours
    finally:
        os.kill(run, signal.SIGCONT)
    wait_for(lambda: not is_alive(run))
    assert finish(words) == (0, "")  # the run has ended, and its record is taken
    assert "target NOT met" in (tmp_path / SEED_0 / "output.log").read_text()
