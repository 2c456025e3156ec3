"""The network of hlb-gpt 0.4.1 (github.com/tysam-code/hlb-gpt), written anew from its description.

What is unusual about it:
- one LayerNorm and one projection per block give queries, keys and a GEGLU; a half of the GEGLU
  stays with its token, and the other half are the values of attention (nonlinear values)
- a single attention head, with queries and keys of D / 8
- no positions but a learned slope per block, which biases attention towards near tokens; the
  bias is part of the queries and keys here, so that attention needs no (T, T) tensor
- embedding gradients are divided by the token's count in the batch

Shapes: B sequences, T tokens, D width, H heads, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlbgpt.models.base import Network, require, require_not_negative, require_positive
from hlbgpt.models.kv_cache import KVCache, causal_attention, token_positions
from hlbgpt.models.lm_head import LMHead, TokenScores


class HLB041(Network):
    """Latent attention blocks between an embedding and an untied LM head.

    Args:
        vocab_size: V, at least the tokenizer's; a multiple of 64 is faster on a GPU.
        max_sequence_length: Longest sequence.
        width: D, of the residual stream; a multiple of 8.
        num_blocks: Number of blocks, each attention and MLP in one.
        loss_chunk_tokens: Number of tokens whose logits exist in float32 at a time; 0 for all. It
            changes memory and speed, not the loss.
    """

    supports_kv_cache = True

    def __init__(
        self,
        vocab_size: int = 50304,
        max_sequence_length: int = 1024,
        width: int = 384,
        num_blocks: int = 8,
        loss_chunk_tokens: int = 0,
    ) -> None:
        super().__init__()
        require_positive(vocab_size=vocab_size, max_sequence_length=max_sequence_length)
        require_not_negative(loss_chunk_tokens=loss_chunk_tokens)
        require_positive(width=width, num_blocks=num_blocks)
        require(width % 8 == 0, f"width: {width} is not divisible by 8; round it")
        self.vocab_size, self.max_sequence_length = vocab_size, max_sequence_length
        self.loss_chunk_tokens = loss_chunk_tokens
        self.embedding = nn.Embedding(vocab_size, width, scale_grad_by_freq=True)
        self.blocks = nn.ModuleList(
            LatentBlock(width, num_blocks, max_sequence_length) for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(width, bias=False)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.25 / width**0.5)
        nn.init.normal_(self.lm_head.weight, std=0.5 / width**0.5)

    def flops_per_token(self, sequence_length: int) -> float:
        """See `Network`; attention takes 2 T D / 8 for the scores and 2 T D for the values."""
        attention = 9 * sequence_length * self.embedding.embedding_dim // 4 * len(self.blocks)
        return super().flops_per_token(sequence_length) + 3 * attention

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        per_token: bool = False,
        kv_cache: KVCache | None = None,
    ) -> Tensor | TokenScores:
        positions = token_positions(tokens, kv_cache)
        x = self.embedding(tokens)  # (B, T, D)
        for block in self.blocks:
            x = block(x, positions, kv_cache)
        if kv_cache is not None:
            x = kv_cache.advance(x)  # (B, 1, D)
        x = self.norm(x)
        lm_head = LMHead(self.lm_head.weight, chunk_tokens=self.loss_chunk_tokens)
        return lm_head.output(x, targets, per_token=per_token)


class LatentBlock(nn.Module):
    def __init__(self, width: int, num_blocks: int, max_sequence_length: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.sizes = (width // 8, width // 8, 2 * width, 2 * width)
        self.num_heads = _num_heads(width)
        # Of positions, see `_with_positions`: a power of two, of which the longest has up to 256.
        self.unit = 1 << max(0, (max_sequence_length - 1).bit_length() - 8)
        self.up_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)
        self.slope = nn.Parameter(torch.ones(1))
        nn.init.normal_(self.up_proj.weight, std=0.25 / width**0.5)
        nn.init.normal_(self.down_proj.weight, std=0.5 / width**0.5 / num_blocks)

    def forward(self, x: Tensor, positions: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        q, k, linear, gate = self.up_proj(self.norm(x)).split(self.sizes, dim=-1)
        local, v = (linear * F.gelu(gate)).chunk(2, dim=-1)  # (B, T, D) each
        q, k = (
            part[:, :, None].repeat(1, 1, self.num_heads, 1)  # (B, T, H, D / H)
            for part in self._with_positions(q, k, positions)
        )
        v = v.unflatten(-1, (self.num_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        attended = causal_attention(q, k, v, kv_cache, self, scale=self.sizes[0] ** -0.5)
        local_and_attended = torch.cat([local, attended.transpose(1, 2).flatten(2)], dim=-1)
        return x + self.down_proj(local_and_attended)

    def _with_positions(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, T, D / H), padded, whose scores include the bias by distance.

        The bias m (j - i) of query i and key j is the product of [m, -m i] and [j, 1]. Positions
        are split into a multiple of `unit` and the rest, so that bfloat16 holds both exactly. But
        the gradient of m is a small difference of large sums, which it rounds more than others.
        """
        high, low = positions // self.unit, positions % self.unit
        one, unit = torch.ones_like(positions), torch.full_like(positions, self.unit)
        m = F.softplus(self.slope) * self.sizes[0] ** 0.5  # attention divides by this root
        of_q = (torch.stack([one, one, -high, -low], dim=-1) * m.float()).to(q.dtype)
        of_k = torch.stack([unit * high, low, unit, one], dim=-1).to(k.dtype)
        of_q, of_k = (part.expand(*q.shape[:2], -1) for part in (of_q, of_k))
        zeros = q.new_zeros(*q.shape[:2], 8 * self.sizes[0] // self.num_heads - self.sizes[0] - 4)
        return torch.cat([q, of_q, zeros], dim=-1), torch.cat([k, of_k, zeros], dim=-1)


def _num_heads(width: int) -> int:
    """H, the number of parts of the values, all with the same attention weights.

    With queries and keys padded to the size of a part, hlb-gpt's one head of D / 8 by D can use the
    fast kernels, which want one size of at most 256; 128 is their best.
    """
    least = max(width // 8 + 4, min(width, 128))
    return max(n for n in range(1, width) if width % n == 0 and width // n >= least)
