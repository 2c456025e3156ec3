"""The three recipes, small: optimizer, schedule, callbacks and network of each."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import nn

from hlbgpt.callbacks import (
    HLB010BatchSize,
    HLB041BatchSize,
    LossScaledWeightDecay,
    SequenceLengthDoubling,
    TokenSchedule,
)
from hlbgpt.models import GPT, HLB041, FastGPT, Network
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
        lambda groups: MuonAdamW(
            groups, {"block_matrices": {"method": "adamw"}, "embeddings": {"lr": 4 * lr}}, lr=lr
        ),
        lambda optimizer: PowerLaw(optimizer, warmup_steps=4),
        [
            SequenceLengthDoubling(initial=8, every_n_steps=4),
            HLB041BatchSize(rate=20 * growth, every_n_steps=2),
            LossScaledWeightDecay(strength=16.0, base=7.0),
        ],
    )


def speedrun(lr: float, growth: float) -> tuple[Any, Any, list[L.Callback]]:
    return (
        lambda groups: MuonAdamW(groups, lr=lr),
        None,
        [TokenSchedule(TABLE, micro_batch_tokens=64)],
    )


RECIPES = {"baseline": baseline, "hlb041": hlb041, "speedrun": speedrun}


SMALL: dict[str, Any] = {"vocab_size": 512, "max_sequence_length": 128, "width": 64}
# The network of each recipe, with all that its config switches on.
NETWORKS: dict[str, Callable[[], Network]] = {
    "baseline": lambda: GPT(**SMALL, num_heads=2, num_blocks=2),
    "hlb041": lambda: HLB041(**SMALL, num_blocks=2),
    "speedrun": lambda: FastGPT(
        **SMALL,
        num_heads=2,
        num_blocks=2,
        cutoffs=[64, 160],
        capacity=[0.5, 0.25],
        value_embed_blocks=1,
        bigram_buckets=512,
        subword_buckets=256,
        head_input=True,
        pointer_dim=16,
        fused_mlp=True,
    ),
}


def random_network(name: str, *, std: float = 0.2) -> Network:
    """A network of `NETWORKS` with random weights, because many start as zero."""
    torch.manual_seed(0)
    net = NETWORKS[name]()
    net.init_from_spelling([bytes([i]) for i in range(256)])
    net.init_from_token_counts(torch.randint(1000, (256,)))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=std) if parameter.numel() > 1 else parameter.data.add_(std)
    return net


def kind_of(recipe: str, device: torch.device, **kind: Any) -> dict[str, Any]:
    """Arguments of `test_resume.run` for the recipe's own network on `device`."""
    where = {"accelerator": device.type, "precision": "bf16-mixed", "growth": 0.0}
    return {"recipe": recipe, "build": NETWORKS[recipe], **where, **kind}
