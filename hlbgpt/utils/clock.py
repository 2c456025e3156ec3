"""Clocks: a stopwatch that can be paused and resumed, and the age of this process."""

import os
import time
from pathlib import Path

import torch


class Stopwatch:
    """Adds up the seconds between `start` and `stop`, in any number of laps.

    Monotonic, so changes of the system's time do not reach it. `seconds` can be read while it
    runs, and `offset` carries over what an earlier process has measured.
    """

    def __init__(self, offset: float = 0.0) -> None:
        self._total = offset
        self._started: float | None = None

    @property
    def running(self) -> bool:
        return self._started is not None

    @property
    def seconds(self) -> float:
        lap = 0.0 if self._started is None else time.monotonic() - self._started
        return self._total + lap

    def start(self) -> None:
        if self._started is None:
            self._started = time.monotonic()

    def stop(self) -> None:
        self._total, self._started = self.seconds, None


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all its work, so that a clock read next tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def process_seconds() -> float:
    """Seconds since this process started; those in which the machine slept are not counted."""
    return _AGE_AT_IMPORT + time.monotonic() - _IMPORTED


def _process_age() -> float:
    """Seconds since this process started, as the system knows it.

    Linux keeps the time of birth of each process; elsewhere the count starts at the import of
    this file, a fraction of a second later.
    """
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return 0.0
    # Field 22, in clock ticks since boot; the second field may itself hold spaces and brackets.
    born = int(stat.read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - born


_IMPORTED, _AGE_AT_IMPORT = time.monotonic(), _process_age()
