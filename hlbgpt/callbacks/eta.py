"""When a falling loss will meet its target."""

import math
from collections.abc import Sequence

_POINTS = 4


def seconds_to_target(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """Seconds from the last of `points` until the target is met; None if it is not in sight.

    Losses fall in about a straight line over the logarithm of time; the line is fitted by least
    squares to the last four validations. It knows nothing of a cooldown to come, with which the
    target is met earlier.

    Args:
        points: Seconds of training, above 0 and increasing, and the value then.
        target: The value to be met.
    """
    recent = [(math.log(seconds), value) for seconds, value in points if seconds > 0][-_POINTS:]
    if len(recent) < 2:
        return None
    x, y = (sum(values) / len(recent) for values in zip(*recent, strict=True))
    spread = sum((a - x) ** 2 for a, _ in recent)
    slope = sum((a - x) * (b - y) for a, b in recent) / spread if spread else 0.0
    if slope == 0 or (target - y) / slope > math.log(1e9):
        return None
    left = math.exp(x + (target - y) / slope) - points[-1][0]
    rises = slope > 0
    towards = (target > recent[-1][1]) == rises
    return max(0.0, left) if towards else None
