"""What training gets through: tokens and FLOPs, in all and by the second."""

import time
from typing import Any

from hlbgpt.models import Network


class Throughput:
    """Counts on the host alone, so that no step waits for the device.

    Attributes:
        tokens: Trained on, on all devices.
        flops: Spent on them, as `Network.flops_per_token` counts.
        peak: FLOP/s that all devices together can reach; None where that is not known.
    """

    def __init__(self) -> None:
        self.tokens, self.flops = 0, 0.0
        self.peak: float | None = None
        self._costs: dict[int, float] = {}  # FLOPs a token, by the sequence length
        self._uncounted = 0  # tokens of a checkpoint from before FLOPs were counted
        self._since = (0.0, 0, 0.0)  # when rates were last asked for: seconds, tokens, FLOPs

    def begin(self) -> None:
        """Start anew to measure; what a token costs may have changed with the token counts."""
        self._costs.clear()
        self.restart()

    def restart(self) -> None:
        """Leave out of the rates what was since they were last asked for."""
        self._since = time.monotonic(), self.tokens, self.flops

    def add(self, net: Network, tokens: int, sequence_length: int) -> None:
        """Count the `tokens` that all devices trained on in windows of `sequence_length`."""
        if sequence_length not in self._costs:
            self._costs[sequence_length] = float(net.flops_per_token(sequence_length))
        self.tokens += tokens
        self.flops += (tokens + self._uncounted) * self._costs[sequence_length]
        self._uncounted = 0

    def rates(self) -> dict[str, float]:
        """Tokens a second and MFU since they were last asked for, as far as they are known."""
        then, tokens, flops = self._since
        self.restart()
        if (seconds := self._since[0] - then) <= 0:
            return {}
        found = {"tokens_per_second": (self.tokens - tokens) / seconds}
        if self.peak is not None:
            found["mfu"] = (self.flops - flops) / seconds / self.peak
        return found

    def figures(self, seconds: float) -> dict[str, float | None]:
        """What a record says of a run with `seconds` of training: means over the run."""
        known = self.peak is not None and seconds > 0
        return {
            "flops_per_token": self.flops / self.tokens if self.tokens else None,
            "mfu": self.flops / seconds / self.peak if known and self.peak else None,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"tokens_seen": self.tokens, "flops": self.flops}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens, self.flops = state["tokens_seen"], state.get("flops", 0.0)
        self._uncounted = 0 if "flops" in state else self.tokens
