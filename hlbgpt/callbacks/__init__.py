"""Callbacks, each to be added, taken out or replaced in YAML by its `class_path`."""

from hlbgpt.callbacks.checkpoint import LastCheckpoint
from hlbgpt.callbacks.console import Console
from hlbgpt.callbacks.divergence import StopOnDivergence
from hlbgpt.callbacks.hlb010 import HLB010BatchSize
from hlbgpt.callbacks.hlb041 import HLB041BatchSize, SequenceLengthDoubling
from hlbgpt.callbacks.next_step import NextStep
from hlbgpt.callbacks.samples import Samples
from hlbgpt.callbacks.time_to_target import TimeToTarget
from hlbgpt.callbacks.token_schedule import TokenSchedule
from hlbgpt.callbacks.weight_decay import LossScaledWeightDecay

__all__ = [
    "Console",
    "HLB010BatchSize",
    "HLB041BatchSize",
    "LastCheckpoint",
    "LossScaledWeightDecay",
    "NextStep",
    "Samples",
    "SequenceLengthDoubling",
    "StopOnDivergence",
    "TimeToTarget",
    "TokenSchedule",
]
