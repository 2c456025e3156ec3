"""Signals that stop a run after its current step instead of in the middle of it."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.plugins.environments import SLURMEnvironment

from hlbgpt.utils.command import STOPS, Interrupted


class Signals:
    """Notes SIGTERM, SIGINT, SIGHUP and, on SLURM, the signal that announces the end of the job.

    Replaces Lightning's handlers, which act in the middle of a step; Lightning itself puts the
    earlier ones back when training ends. A second signal of the same kind stops the run at once,
    except for SIGHUP, which a terminal that is closed sends twice.

    Attributes:
        received: The first signal that came; None if none came.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._earlier: dict[int, Any] = {}  # handlers that ours replaced

    def catch(self, trainer: L.Trainer) -> None:
        """Begin to note signals; in the main thread only, because others get none."""
        if self._earlier or threading.current_thread() is not threading.main_thread():
            return
        caught = [*STOPS]
        if SLURMEnvironment.detect():
            caught.append(signal.SIGUSR1)
        self.received = None
        self._earlier = {
            signum: signal.signal(signum, self._on_signal)
            for signum in caught
            if signal.getsignal(signum) != signal.SIG_IGN  # as `nohup` asks for
        }
        # Before each step on several devices, Lightning sends whether its handler, which ours has
        # replaced, has seen a SIGTERM, and the host waits for its device to read the answer.
        if hasattr(loop := trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"):
            setattr(loop, "_broadcast_sigterm_tensor", lambda: None)  # noqa: B010 (mypy)

    def release(self) -> None:
        """Training is over; Lightning has put the earlier handlers back."""
        self._earlier = {}

    def requeue(self, trainer: L.Trainer, folder: Path, signum: int) -> None:
        """Let Lightning's handler put the SLURM job back in the queue, if `signum` asks for that.

        All ranks must ask, whichever of them has got the signal.
        """
        handler = self._earlier.get(signum)
        if signum != signal.SIGUSR1 or not callable(handler):
            return
        handler(signum, None)
        if trainer.is_global_zero:
            # It also saves a checkpoint, which Lightning would prefer to last.ckpt from then on.
            for path in folder.glob("hpc_ckpt_*.ckpt"):
                path.unlink()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.received == signum and signum != getattr(signal, "SIGHUP", None):
            raise Interrupted(signum)
        self.received = self.received or signum
