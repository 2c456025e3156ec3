"""GPT: the network of hlb-gpt 0.1.0 (github.com/tysam-code/hlb-gpt, main.py).

Unlike GPT-2, it has no biases, an exact GELU, and a vocabulary of 50304, a multiple of 64. As in
GPT-2, positions are learned and the LM head's matrix is the embedding.

Shapes: B sequences, T tokens, D width, H heads, V vocabulary.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from hlbgpt.models.base import Network, require, require_not_negative, require_positive
from hlbgpt.models.kv_cache import KVCache, causal_attention, token_positions
from hlbgpt.models.lm_head import LMHead, TokenScores


class GPT(Network):
    """A pre-norm decoder with learned positions and tied embeddings.

    Args:
        vocab_size: V, at least the tokenizer's; a multiple of 64 is faster on a GPU.
        max_sequence_length: Longest sequence, the number of learned positions.
        width: D, of the residual stream.
        num_heads: H, attention heads of D / H each.
        num_blocks: Number of blocks, each attention and an MLP of width 4 D.
        init_std: Standard deviation of the initial weights. 0.02 suits a width of 384 and more; a
            narrow network learns to attend sooner from about 0.7 / sqrt(D).
        loss_chunk_tokens: Number of tokens whose logits exist in float32 at a time; 0 for all. It
            changes memory and speed, not the loss.
    """

    supports_kv_cache = True

    def __init__(
        self,
        vocab_size: int = 50304,
        max_sequence_length: int = 256,
        width: int = 384,
        num_heads: int = 6,
        num_blocks: int = 6,
        init_std: float = 0.02,
        loss_chunk_tokens: int = 0,
    ) -> None:
        super().__init__()
        require_positive(vocab_size=vocab_size, max_sequence_length=max_sequence_length)
        require_not_negative(loss_chunk_tokens=loss_chunk_tokens)
        require_positive(width=width, num_heads=num_heads, num_blocks=num_blocks)
        require(init_std > 0, f"init_std: {init_std} is not above 0; try 0.02")
        divisible = width % num_heads == 0
        require(divisible, f"width: {width} is not divisible by num_heads {num_heads}; change one")
        self.vocab_size, self.max_sequence_length = vocab_size, max_sequence_length
        self.loss_chunk_tokens = loss_chunk_tokens
        self.embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(max_sequence_length, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width, bias=False)
        residual_std = init_std / math.sqrt(2 * num_blocks)  # as in GPT-2
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=residual_std if residual else init_std)

    def flops_per_token(self, sequence_length: int) -> float:
        """See `Network`; attention takes 2 T D for the scores and again for the values."""
        attention = 4 * sequence_length * self.embedding.embedding_dim * len(self.blocks)
        weights = super().flops_per_token(sequence_length) + 6 * self.embedding.weight.numel()
        return weights + 3 * attention

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        per_token: bool = False,
        kv_cache: KVCache | None = None,
    ) -> Tensor | TokenScores:
        positions = token_positions(tokens, kv_cache)
        x = self.embedding(tokens) + self.position_embedding(positions)  # (B, T, D)
        for block in self.blocks:
            x = block(x, kv_cache)
        if kv_cache is not None:
            x = kv_cache.advance(x)  # (B, 1, D)
        x = self.norm(x)
        lm_head = LMHead(self.embedding.weight, chunk_tokens=self.loss_chunk_tokens)
        return lm_head.output(x, targets, per_token=per_token)


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, num_heads)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        x = x + self.attention(x, kv_cache)
        return x + self.mlp(x)


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width, bias=False)
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, D / H)
            for part in self.qkv_proj(self.norm(x)).chunk(3, dim=-1)
        )
        y = causal_attention(q, k, v, kv_cache, self)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.up_proj = nn.Linear(width, 4 * width, bias=False)
        self.down_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(self.norm(x))))  # (B, T, D)
