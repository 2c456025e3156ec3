"""What GPUs can reach, by their makers' data sheets: the yardstick of MFU and of plans."""

import re
from typing import NamedTuple

import torch

from hlbgpt.utils.errors import InputError
from hlbgpt.utils.machine import device_name


class Card(NamedTuple):
    """A GPU.

    Attributes:
        name: As `scripts/plan.py --gpu` takes it.
        device: Pattern of what its driver calls it, without the maker.
        flops: Peak of dense bf16 matrix products with sums in fp32, FLOP/s.
        bandwidth: Of its memory, bytes a second.
        memory: Bytes.
    """

    name: str
    device: str
    flops: float
    bandwidth: float
    memory: float


# Sources: NVIDIA's data sheets of A100, H100, H200, L4 and T4, whose figures "with sparsity" are
# halved here; the whitepapers of GA102 and Ada for RTX 3090 and 4090. The T4 knows no bf16: fp16.
# The patterns fit whole names, for a laptop's 4090, an H100 NVL or a slice of a card by MIG have
# the figures of none of these.
CARDS = (
    Card("A100", r"A100-(SXM4|PCIE)-40GB", 312e12, 1555e9, 40e9),
    Card("A100-80GB", r"A100-SXM4-80GB", 312e12, 2039e9, 80e9),
    Card("A100-80GB-PCIe", r"A100 80GB PCIe", 312e12, 1935e9, 80e9),
    Card("H100-SXM", r"H100 80GB HBM3", 989.4e12, 3350e9, 80e9),
    Card("H100-PCIe", r"H100 PCIe", 756e12, 2000e9, 80e9),
    Card("H200", r"H200", 989.4e12, 4800e9, 141e9),
    Card("L4", r"L4", 121e12, 300e9, 24e9),
    Card("RTX4090", r"GeForce RTX 4090", 165.2e12, 1008e9, 24e9),
    Card("RTX3090", r"GeForce RTX 3090", 71e12, 936e9, 24e9),
    Card("T4", r"T4", 65e12, 320e9, 16e9),
)


def card_of(device: torch.device) -> Card | None:
    """The card that `device` is; None for one that the table lacks, and for a CPU."""
    return _find(device_name(device)) if device.type == "cuda" else None


def _find(name: str) -> Card | None:
    bare = re.sub(r"^(NVIDIA|Tesla) ", "", name)
    return next((card for card in CARDS if re.fullmatch(card.device, bare)), None)


def card_named(name: str) -> Card:
    """The card of a name, whatever its case; raises InputError with the names there are."""
    plain = re.sub(r"[ _-]", "", name).lower()
    for card in CARDS:
        if card.name.replace("-", "").lower() == plain:
            return card
    raise InputError(f"--gpu: no card {name!r} is known; take one of {known_cards()}")


def known_cards() -> str:
    return ", ".join(card.name for card in CARDS)
