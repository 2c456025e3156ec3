"""Continuing a text with a network."""

import dataclasses

import torch
from torch import Tensor

from hlbgpt.errors import InputError
from hlbgpt.models import Network


@dataclasses.dataclass
class Generation:
    """How `predict` and samples continue a prompt.

    Args:
        max_new_tokens: Tokens to add to the prompt.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Draw from the k likeliest tokens only; 0 draws from all.
        seed: Seed of the draws.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "temperature", "top_k"):
            if (value := getattr(self, name)) < 0:
                raise InputError(f"model.generation.{name}: {value} is negative; use 0 or more")


@torch.no_grad()
def generate(net: Network, prompt: Tensor, how: Generation, *, vocab_size: int) -> Tensor:
    """Continue `prompt` (1, t) by `how.max_new_tokens` tokens: (1, t + max_new_tokens).

    Only the first `vocab_size` logits are drawn from, so padding of the vocabulary never shows.
    Past the network's context the oldest tokens are forgotten. The draws are made on the CPU and
    are the same on every device.
    """
    random = torch.Generator().manual_seed(how.seed)
    context = net.max_sequence_length or prompt.shape[1] + how.max_new_tokens
    tokens = prompt
    for _ in range(how.max_new_tokens):
        # `forward` past torch.compile: every length would compile anew.
        logits = net.forward(tokens[:, -context:])[0, -1, :vocab_size].float().cpu()
        tokens = torch.cat([tokens, _draw(logits, how, random).to(tokens)[None]], dim=1)
    return tokens


def _draw(logits: Tensor, how: Generation, random: torch.Generator) -> Tensor:
    """One token (1,) from `logits` (V,)."""
    if how.temperature == 0:
        return logits.argmax(keepdim=True)
    if 0 < how.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(how.top_k).values[-1], -torch.inf)
    return torch.multinomial((logits / how.temperature).softmax(-1), 1, generator=random)
