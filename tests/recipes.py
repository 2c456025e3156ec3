"""The three recipes, small: optimizer, schedule and callbacks of each."""

from typing import Any

import lightning as L
import torch

from hlbgpt.callbacks import (
    HLB010BatchSize,
    HLB041BatchSize,
    LossScaledWeightDecay,
    SequenceLengthDoubling,
    TokenSchedule,
)
from hlbgpt.optim import MuonAdamW
from hlbgpt.optim.schedules import PowerLaw, ScheduleRow

MAX_STEPS = 14

# Three sequence lengths and step sizes over 14 steps, most of them of several micro-batches.
TABLE = [
    ScheduleRow(0, sequence_length=8, step_tokens=64, lr=1.0, momentum=0.8, validate_every=100),
    ScheduleRow(200, sequence_length=16, step_tokens=192, momentum=0.95),
    ScheduleRow(700, sequence_length=32, step_tokens=256, lr=1.0, validate_every=300),
    ScheduleRow(2500, lr=0.1),
]


def baseline(lr: float, growth: float) -> tuple[Any, Any, list[L.Callback]]:
    return (
        lambda groups: torch.optim.AdamW(groups, lr=lr),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=MAX_STEPS),
        [HLB010BatchSize(rate=growth, initial_norm=0.0)] if growth else [],
    )


def hlb041(lr: float, growth: float) -> tuple[Any, Any, list[L.Callback]]:
    return (
        lambda groups: MuonAdamW(groups, {"embeddings": {"lr": 4 * lr}}, lr=lr),
        lambda optimizer: PowerLaw(optimizer, warmup_steps=4),
        [
            SequenceLengthDoubling(initial=8, every_n_steps=4),
            HLB041BatchSize(rate=6.0, every_n_steps=2),
            LossScaledWeightDecay(strength=16.0, base=7.0),
        ],
    )


def speedrun(lr: float, growth: float) -> tuple[Any, Any, list[L.Callback]]:
    return (
        lambda groups: MuonAdamW(groups, {"block_matrices": {"method": "muon"}}, lr=lr),
        None,
        [TokenSchedule(TABLE, micro_batch_tokens=64)],
    )


RECIPES = {"baseline": baseline, "hlb041": hlb041, "speedrun": speedrun}
