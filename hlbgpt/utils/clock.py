"""A stopwatch, and the seconds since a run began."""

import os
import time
from pathlib import Path

import torch


class Stopwatch:
    """Measures seconds between `start` and `stop`, summed over any number of laps.

    The clock is monotonic: changes of the system's time do not affect it.

    Args:
        offset: Seconds to start from, such as those that an earlier process measured.
    """

    def __init__(self, offset: float = 0.0) -> None:
        self._total = offset
        self._started: float | None = None

    @property
    def running(self) -> bool:
        """Whether the stopwatch is running."""
        return self._started is not None

    @property
    def seconds(self) -> float:
        """Seconds so far, including the lap that is running."""
        lap = 0.0 if self._started is None else time.monotonic() - self._started
        return self._total + lap

    def start(self) -> None:
        """Start a lap unless one is running."""
        if self._started is None:
            self._started = time.monotonic()

    def stop(self) -> None:
        """End the lap."""
        self._total, self._started = self.seconds, None


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished its work, so that a clock read next includes it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def begin_run() -> None:
    """Let `run_seconds` count from now; without this call it counts from the process's start."""
    global _began
    _began = time.monotonic()


def run_seconds() -> float:
    """Seconds since the run began, without those in which the machine was suspended."""
    return time.monotonic() - _began


def _process_age() -> float:
    """Seconds since this process started by Linux's records; 0 on other systems."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return 0.0
    # Field 22 is the start in clock ticks since boot. Field 2 may contain spaces and brackets.
    started = int(stat.read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


_began = time.monotonic() - _process_age()
