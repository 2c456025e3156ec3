"""Callbacks, each to be added, taken out or replaced in YAML by its `class_path`."""

from hlbgpt.callbacks.console import Console
from hlbgpt.callbacks.divergence import StopOnDivergence
from hlbgpt.callbacks.gradient_histograms import GradientHistograms
from hlbgpt.callbacks.hlb010_batch import HLB010BatchSize
from hlbgpt.callbacks.hlb041_batch import HLB041BatchSize, SequenceLengthDoubling
from hlbgpt.callbacks.last_checkpoint import LastCheckpoint
from hlbgpt.callbacks.samples import Samples
from hlbgpt.callbacks.step_shape import StepShape
from hlbgpt.callbacks.target import Milestone
from hlbgpt.callbacks.time_to_target import TimeToTarget
from hlbgpt.callbacks.token_schedule import TokenSchedule
from hlbgpt.callbacks.weight_decay import LossScaledWeightDecay

__all__ = [
    "Console",
    "GradientHistograms",
    "HLB010BatchSize",
    "HLB041BatchSize",
    "LastCheckpoint",
    "LossScaledWeightDecay",
    "Milestone",
    "Samples",
    "SequenceLengthDoubling",
    "StepShape",
    "StopOnDivergence",
    "TimeToTarget",
    "TokenSchedule",
]
