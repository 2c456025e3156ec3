"""A run's folder, checkpoints, saved config and TensorBoard logger."""

from hlbgpt.runs.checkpoint_io import AtomicCheckpointIO, load_checkpoint, require_matching_weights
from hlbgpt.runs.logger import SECONDS, TOKENS, RunLogger

__all__ = [
    "SECONDS",
    "TOKENS",
    "AtomicCheckpointIO",
    "RunLogger",
    "load_checkpoint",
    "require_matching_weights",
]
