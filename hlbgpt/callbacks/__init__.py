"""Callbacks, each to be added, taken out or replaced in YAML by its `class_path`."""

from hlbgpt.callbacks.batch_growth import BatchGrowth
from hlbgpt.callbacks.checkpoint import LastCheckpoint
from hlbgpt.callbacks.console import Console
from hlbgpt.callbacks.divergence import StopOnDivergence
from hlbgpt.callbacks.hlb041 import SequenceGrowth, SteeredBatch
from hlbgpt.callbacks.samples import Samples
from hlbgpt.callbacks.time_to_target import TimeToTarget
from hlbgpt.callbacks.token_schedule import TokenSchedule
from hlbgpt.callbacks.weight_decay import LossScaledWeightDecay

__all__ = [
    "BatchGrowth",
    "Console",
    "LastCheckpoint",
    "LossScaledWeightDecay",
    "Samples",
    "SequenceGrowth",
    "SteeredBatch",
    "StopOnDivergence",
    "TimeToTarget",
    "TokenSchedule",
]
