"""The network of hlb-gpt 0.4.1, written anew from its description (github.com/tysam-code/hlb-gpt).

What sets it apart: one LayerNorm and one expansion a block give queries, keys and a GEGLU, of which
one half stays local while the other is what attention hands on (nonlinear values); a single head of
D / 8; and for positions nothing but a learned slope a block, which biases attention to the near.

Shapes: B sequences, T tokens, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlbgpt.models.base import Network
from hlbgpt.models.kv_cache import Cache
from hlbgpt.models.lm_head import Classes, TokenScores
from hlbgpt.utils.errors import InputError, require_positive


class HLB041(Network):
    """Latent attention blocks with nonlinear values between an embedding and an untied head.

    Args:
        vocab_size: V, at least the tokenizer's; a multiple of 64 is faster on a GPU.
        max_sequence_length: Longest sequence it can read.
        width: D, of the residual stream; a multiple of 8.
        num_blocks: Blocks, each attention and MLP in one.
        loss_chunk: Tokens whose logits exist at a time; 0 for all. It changes memory and speed,
            not the loss.
    """

    reads_cache = True

    def __init__(
        self,
        vocab_size: int = 50304,
        max_sequence_length: int = 1024,
        width: int = 384,
        num_blocks: int = 8,
        loss_chunk: int = 0,
    ) -> None:
        super().__init__()
        require_positive(
            "model.net ",
            vocab_size=vocab_size,
            max_sequence_length=max_sequence_length,
            width=width,
            num_blocks=num_blocks,
        )
        if width % 8:
            raise InputError(f"model.net width: {width} is not divisible by 8; round it")
        self.vocab_size, self.max_sequence_length = vocab_size, max_sequence_length
        self.loss_chunk = loss_chunk
        # A token's gradient is divided by how often it came: rare and frequent ones learn alike.
        self.embedding = nn.Embedding(vocab_size, width, scale_grad_by_freq=True)
        self.blocks = nn.ModuleList(LatentBlock(width, num_blocks) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.25 / width**0.5)
        nn.init.normal_(self.head.weight, std=0.5 / width**0.5)

    def flops_per_token(self, sequence_length: int) -> float:
        """As `Network`; a block's attention is 2 T D / 8 for the scores and 2 T D for the rest."""
        width = self.embedding.embedding_dim
        attention = 2 * sequence_length * (width // 8 + width)
        return super().flops_per_token(sequence_length) + 3 * len(self.blocks) * attention

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        per_token: bool = False,
        cache: Cache | None = None,
    ) -> Tensor | TokenScores:
        """Logits (B, T, V) of `tokens` (B, T); with `targets` (B, T) what `head.score` returns."""
        x = self.embedding(tokens)  # (B, T, D)
        if cache is None:
            place = torch.arange(tokens.shape[1], device=tokens.device)
            distance = place - place[:, None]  # (T, T): j - i
        else:
            cache.begin(tokens)
            distance = cache.distance
        for block in self.blocks:
            x = block(x, distance, cache)
        if cache is not None:
            x = cache.end(x)
        classes = Classes(self.head.weight, chunk=self.loss_chunk)
        x = self.norm(x)
        return classes.logits(x) if targets is None else classes.score(x, targets, per_token)


class LatentBlock(nn.Module):
    """x + project([local, attention(q, k, values)]) of one normed x."""

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.sizes = (width // 8, width // 8, 2 * width, 2 * width)
        self.expand = nn.Linear(width, sum(self.sizes), bias=False)
        self.project = nn.Linear(2 * width, width, bias=False)
        self.slope = nn.Parameter(torch.ones(()))
        nn.init.normal_(self.expand.weight, std=0.25 / width**0.5)
        nn.init.normal_(self.project.weight, std=0.5 / width**0.5 / num_blocks)

    def forward(self, x: Tensor, distance: Tensor, cache: Cache | None = None) -> Tensor:
        query, key, linear, gate = self.expand(self.norm(x)).split(self.sizes, dim=-1)
        local, values = (linear * F.gelu(gate)).chunk(2, dim=-1)  # (B, T, D) each
        if cache is not None:
            key = cache.extend((self, "keys"), key)
            values = cache.extend((self, "values"), values)
        bias = F.softplus(self.slope) * distance
        bias = bias.masked_fill(distance > 0, -torch.inf).to(query.dtype)
        near = F.scaled_dot_product_attention(query, key, values, attn_mask=bias)
        return x + self.project(torch.cat([local, near], dim=-1))
