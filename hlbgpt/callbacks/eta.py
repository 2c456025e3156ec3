"""ETA: when the target is met, extrapolated from the validations so far, or the run ends."""

import math
from collections.abc import Sequence

import lightning as L

from hlbgpt.training.module import LanguageModule

_POINTS = 4


def seconds_to_target(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """Seconds from the last of `points` until the target is met; None if that is not in sight.

    Losses fall roughly linearly with the logarithm of time. The line is fitted by least squares to
    the last four validations; it knows nothing of a cooldown to come, which makes a loss fall
    faster.

    Args:
        points: Seconds of training, increasing, and the monitored value at that time.
        target: Value to be met.
    """
    recent = [(math.log(seconds), value) for seconds, value in points if seconds > 0][-_POINTS:]
    if len(recent) < 2:
        return None
    x, y = (sum(values) / len(recent) for values in zip(*recent, strict=True))
    spread = sum((a - x) ** 2 for a, _ in recent)
    slope = sum((a - x) * (b - y) for a, b in recent) / spread if spread else 0.0
    if slope == 0 or (target - y) / slope > math.log(1e9):
        return None
    if (slope > 0) != (target > recent[-1][1]):  # moving away from the target
        return None
    return max(0.0, math.exp(x + (target - y) / slope) - points[-1][0])


def fraction_done(trainer: L.Trainer, module: LanguageModule) -> float | None:
    """Part of the planned run that is over, from 0 to 1; None where no end is planned."""
    steps = trainer.global_step, trainer.max_steps
    tokens = module.tokens_seen, module.data.max_tokens or -1
    done = [made / planned for made, planned in (steps, tokens) if planned > 0]
    return min(1.0, max(done)) if done else None


def in_words(seconds: float) -> str:
    """A duration as people say it: 45 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
