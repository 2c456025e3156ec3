"""Throughput: tokens and FLOPs of training, in total and per second."""

import time
from typing import Any

import torch

from hlbgpt.models import Network
from hlbgpt.utils.hardware import gpu_of


class Throughput:
    """Counts on the host alone, so that no step waits for the device.

    Attributes:
        tokens: Tokens trained on, on all devices.
        batch_tokens: Those of the last batch.
        flops: FLOPs spent on them, as `Network.flops_per_token` counts.
        peak: Peak FLOP/s of all devices together; None where it is not known.
    """

    def __init__(self) -> None:
        self.tokens, self.batch_tokens, self.flops = 0, 0, 0.0
        self.peak: float | None = None
        self._flops_per_token: dict[int, float] = {}  # by the sequence length
        self._since = (0.0, 0, 0.0)  # at the last call of `rates`: seconds, tokens, FLOPs

    def set_peak(self, device: torch.device, world_size: int) -> None:
        """Look up the peak of `world_size` devices like `device`."""
        gpu = gpu_of(device)
        self.peak = gpu.flops * world_size if gpu else None

    def begin(self) -> None:
        """Begin to measure; the network's FLOPs may have changed with the token counts."""
        self._flops_per_token.clear()
        self.restart()

    def restart(self) -> None:
        """Leave the time since the last call of `rates` out of the next one."""
        self._since = time.monotonic(), self.tokens, self.flops

    def add(self, net: Network, tokens: int, sequence_length: int) -> None:
        """Count the `tokens` of a batch, of all devices, in windows of `sequence_length`."""
        if sequence_length not in self._flops_per_token:
            self._flops_per_token[sequence_length] = float(net.flops_per_token(sequence_length))
        self.tokens, self.batch_tokens = self.tokens + tokens, tokens
        self.flops += tokens * self._flops_per_token[sequence_length]

    def rates(self) -> dict[str, float]:
        """Tokens per second and MFU since the last call, as far as they are known."""
        then, tokens, flops = self._since
        self.restart()
        if (seconds := self._since[0] - then) <= 0:
            return {}
        found = {"tokens_per_second": (self.tokens - tokens) / seconds}
        if self.peak is not None:
            found["mfu"] = (self.flops - flops) / seconds / self.peak
        return found

    def means(self, seconds: float) -> dict[str, float | None]:
        """FLOPs per token and MFU of a run with `seconds` of training."""
        return {
            "flops_per_token": self.flops / self.tokens if self.tokens else None,
            "mfu": self.flops / seconds / self.peak if self.peak and seconds > 0 else None,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "tokens_seen": self.tokens,
            "batch_tokens": self.batch_tokens,
            "flops": self.flops,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens, self.flops = state["tokens_seen"], state["flops"]
        self.batch_tokens = state["batch_tokens"]
