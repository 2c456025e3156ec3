"""The seed's GPT: the network of hlb-gpt 0.1.0 (github.com/tysam-code/hlb-gpt, main.py).

What sets it apart from GPT-2: no biases anywhere, LayerNorms with a weight only, exact GELU, and
vocabulary 50304 in place of 50257. Positions are learned, the output matrix is the embedding.

Shapes: B sequences, T tokens, D width, H heads, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlbgpt.models.base import Network
from hlbgpt.models.kv_cache import Cache, causal_attention
from hlbgpt.models.lm_head import Classes, TokenScores
from hlbgpt.utils.errors import InputError, require_positive


class GPT(Network):
    """A pre-norm decoder with learned positions and tied embeddings.

    Args:
        vocab_size: V, at least the tokenizer's; a multiple of 64 is faster on a GPU.
        max_sequence_length: Longest sequence it can read; it learns so many positions.
        width: D, of the residual stream.
        num_heads: H, attention heads of D / H each.
        num_blocks: Blocks, each attention, then an MLP of width 4 D.
        init_std: Standard deviation of the initial weights. 0.02 suits a width of 384 and more; a
            narrow network learns to look back sooner from about 0.7 / sqrt(D).
        loss_chunk: Tokens whose logits exist at a time; 0 for all. It changes memory and speed,
            not the loss.
    """

    reads_cache = True

    def __init__(
        self,
        vocab_size: int = 50304,
        max_sequence_length: int = 256,
        width: int = 384,
        num_heads: int = 6,
        num_blocks: int = 6,
        init_std: float = 0.02,
        loss_chunk: int = 0,
    ) -> None:
        super().__init__()
        require_positive(
            "model.net ",
            vocab_size=vocab_size,
            max_sequence_length=max_sequence_length,
            width=width,
            num_heads=num_heads,
            num_blocks=num_blocks,
        )
        if init_std <= 0:
            raise InputError(f"model.net init_std: {init_std} is not above 0; try 0.02")
        if width % num_heads:
            raise InputError(
                f"model.net width: {width} is not divisible by num_heads {num_heads}; "
                "change one of them"
            )
        self.vocab_size, self.max_sequence_length = vocab_size, max_sequence_length
        self.loss_chunk = loss_chunk
        self.embedding = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(max_sequence_length, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width, bias=False)
        self._init_weights(init_std)

    def _init_weights(self, std: float) -> None:
        """Normal; what writes to the residual stream divided by sqrt(2 x blocks), as in GPT-2."""
        residual = std / math.sqrt(2 * len(self.blocks))
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes = name.endswith("project.weight")
                nn.init.normal_(parameter, std=residual if writes else std)

    def flops_per_token(self, sequence_length: int) -> float:
        """As `Network`; a block's attention is 2 T D for the scores and again for the values."""
        head, attention = self.embedding.weight, 4 * sequence_length * self.embedding.embedding_dim
        linear = super().flops_per_token(sequence_length)
        return linear + 6 * head.numel() + 3 * len(self.blocks) * attention

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        per_token: bool = False,
        cache: Cache | None = None,
    ) -> Tensor | TokenScores:
        """Logits (B, T, V) of `tokens` (B, T); with `targets` (B, T) what `head.score` returns."""
        if cache is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        else:
            cache.begin(tokens)
            positions = cache.places
        x = self.embedding(tokens) + self.position(positions)  # (B, T, D)
        for block in self.blocks:
            x = block(x, cache)
        if cache is not None:
            x = cache.end(x)
        classes = Classes(self.embedding.weight, chunk=self.loss_chunk)
        x = self.norm(x)
        return classes.logits(x) if targets is None else classes.score(x, targets, per_token)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, num_heads)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = x + self.attention(x, cache)
        return x + self.mlp(x)


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width, bias=False)
        self.expand = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, D / H)
            for part in self.expand(self.norm(x)).chunk(3, dim=-1)
        )
        y = causal_attention(q, k, v, cache, self)
        return self.project(y.transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.project = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.gelu(self.expand(self.norm(x))))
