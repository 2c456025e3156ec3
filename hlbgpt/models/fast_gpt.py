"""The fast GPT: what public speedruns found to pay and our own runs confirmed, in one file.

What sets it apart from the seed's GPT: RMSNorm without weights, normed queries and keys (QK-norm),
rotary positions of which half the frequencies stand still, ReLU² in the MLP, projections that start
at zero, a way back to the embedding in every block, attention that reads each token mixed with the
two before it, capped logits, an untied head in clusters of frequency that starts from how often
each token comes, a pointer that gives tokens of the window a share of each prediction, and a
residual stream in bf16.
Sources: github.com/KellerJordan/modded-nanogpt, github.com/karpathy/nanochat; for the head see
`hlbgpt.models.adaptive_softmax`, for the pointer `hlbgpt.models.pointer`.

Shapes: B sequences, T tokens, D width, H heads, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlbgpt.models.adaptive_softmax import AdaptiveHead
from hlbgpt.models.base import Network
from hlbgpt.models.kv_cache import Cache, causal_attention
from hlbgpt.models.lm_head import TokenScores
from hlbgpt.models.pointer import Pointer
from hlbgpt.utils.errors import InputError, require_positive


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the width, without weights."""
    return F.rms_norm(x, (x.shape[-1],))


class FastGPT(Network):
    """A decoder that learns much from few tokens, at `MuonAdamW`'s rates.

    Args:
        vocab_size: V, at least the tokenizer's; a multiple of 64 is faster on a GPU.
        max_sequence_length: Longest sequence it can read.
        width: D, of the residual stream.
        num_heads: H, attention heads of D / H each.
        num_blocks: Blocks, each attention, then an MLP of width 4 D.
        cutoffs: Ranks of frequency at which the head's rare clusters begin; empty for the full
            softmax.
        shares: Of each rare cluster in a batch's targets, at most; see `AdaptiveHead`.
        softcap: Logits are kept within ± this; 0 for no cap.
        unigram_bias: Whether logits start from how often each token comes.
        shortcut: Whether every block gets the embedding again.
        value_embeddings: Last blocks that get values straight from the token, from a table each.
        bigram_size: Rows of a table for pairs of tokens, by their hash; 0 for none.
        look_back: Whether attention reads every token mixed with the two before it.
        pointer_size: Size of the queries and keys by which a share of each prediction goes to the
            tokens of the window; 0 for none.
        pointer_repeats: How many tokens before the present one may be found again in the window,
            each with a bonus for what followed there.
        loss_chunk: Tokens whose logits exist in full precision at a time; 0 for all. It changes
            memory and speed, not the loss.
    """

    reads_cache = True
    wants_token_counts = True

    def __init__(
        self,
        vocab_size: int = 50304,
        max_sequence_length: int = 1024,
        width: int = 384,
        num_heads: int = 3,
        num_blocks: int = 8,
        cutoffs: list[int] = [],  # noqa: B006 (never changed)
        shares: list[float] | None = None,
        softcap: float = 15.0,
        unigram_bias: bool = True,
        shortcut: bool = True,
        value_embeddings: int = 0,
        bigram_size: int = 0,
        look_back: bool = True,
        pointer_size: int = 0,
        pointer_repeats: int = 2,
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
        if width % (2 * num_heads):
            raise InputError(
                f"model.net width: {width} is not divisible by twice num_heads {num_heads}, as "
                "rotary positions need it; change one of them"
            )
        self.vocab_size, self.max_sequence_length = vocab_size, max_sequence_length
        self.embedding = nn.Embedding(vocab_size, width)
        self.bigrams = Bigrams(bigram_size, width) if bigram_size else None
        self.rotary = Rotary(width // num_heads, max_sequence_length)
        first = num_blocks - value_embeddings
        self.blocks = nn.ModuleList(
            Block(
                width,
                num_heads,
                shortcut=shortcut,
                look_back=look_back,
                values=vocab_size if i >= first else 0,
            )
            for i in range(num_blocks)
        )
        self.pointer = Pointer(width, pointer_size, pointer_repeats) if pointer_size else None
        self.head = AdaptiveHead(
            width,
            vocab_size,
            cutoffs=tuple(cutoffs),
            shares=None if shares is None else tuple(shares),
            softcap=softcap,
            chunk=loss_chunk,
            unigram_bias=unigram_bias,
        )

    def use_token_counts(self, counts: Tensor) -> None:
        self.head.use_token_counts(counts)

    def flops_per_token(self, sequence_length: int) -> float:
        """As `Network`, with the head as `AdaptiveHead` counts it."""
        attention = 4 * sequence_length * self.embedding.embedding_dim
        linear = super().flops_per_token(sequence_length)
        linear += self.head.flops_per_token()
        if self.pointer is not None:
            linear += self.pointer.flops_per_token(sequence_length)
        return linear + 3 * len(self.blocks) * attention

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        per_token: bool = False,
        cache: Cache | None = None,
    ) -> Tensor | TokenScores:
        """Log-probabilities (B, T, V) of `tokens` (B, T); with `targets` what `score` returns."""
        if cache is not None:
            cache.begin(tokens)
        x = self.embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):  # which leaves embeddings as they are
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = norm(x)
        if self.bigrams is not None:
            x = x + self.bigrams(tokens, cache).to(x.dtype)
        start = x  # (B, T, D)
        for block in self.blocks:
            x = block(x, start, tokens, self.rotary, cache)
        x = norm(x)
        pointed = None if self.pointer is None else self.pointer(x, tokens, cache)
        if cache is not None:
            x = cache.end(x)
            pointed = pointed and pointed.last(1)
        if targets is None:
            return self.head.log_probabilities(x, pointed)
        return self.head(x, targets, pointed, per_token=per_token)


class Bigrams(nn.Module):
    """A row for each pair of a token and the one before, by a hash: (B, T) to (B, T, D)."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        nn.init.zeros_(self.table.weight)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        if cache is None:
            before = F.pad(tokens[:, :-1], (1, 0))
        else:
            before = cache.before(self, tokens, 1)[:, :-1]
        return self.table((before * 1_000_003 + tokens * 8_191) % self.table.num_embeddings)


class Rotary(nn.Module):
    """Rotary positions (arXiv 2104.09864), base 1024; half of the frequencies stand still.

    Args:
        size: d, of a head; even.
        length: Number of positions.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, size: int, length: int) -> None:
        super().__init__()
        frequency = (1 / 1024) ** torch.linspace(0, 1, size // 4)
        frequency = torch.cat([frequency, torch.zeros(size // 2 - size // 4)])
        angle = torch.outer(torch.arange(length), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Turn queries or keys `x` (B, H, T, d)."""
        if cache is None:
            cos, sin = (part[: x.shape[-2]].to(x.dtype) for part in (self.cos, self.sin))
        else:
            cos, sin = (part[cache.places][:, None].to(x.dtype) for part in (self.cos, self.sin))
        left, right = x.chunk(2, dim=-1)
        return torch.cat([left * cos + right * sin, right * cos - left * sin], dim=-1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), after a look back at the embedding."""

    def __init__(
        self, width: int, num_heads: int, *, shortcut: bool, look_back: bool, values: int
    ) -> None:
        super().__init__()
        # One parameter each: slices of one tensor have had wrong gradients when compiled.
        self.keep = nn.Parameter(torch.ones(())) if shortcut else None
        self.again = nn.Parameter(torch.zeros(())) if shortcut else None
        self.look_back = LookBack(width) if look_back else None
        self.attention = Attention(width, num_heads, values)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)
        nn.init.normal_(self.expand.weight, std=(0.33 / width) ** 0.5)
        nn.init.zeros_(self.contract.weight)

    def forward(
        self,
        x: Tensor,
        start: Tensor,
        tokens: Tensor,
        rotary: Rotary,
        cache: Cache | None = None,
    ) -> Tensor:
        if self.keep is not None and self.again is not None:
            x = self.keep.to(x.dtype) * x + self.again.to(x.dtype) * start
        y = norm(x)
        if self.look_back is not None:
            y = self.look_back(y, cache)
        x = x + self.attention(y, tokens, rotary, cache)
        return x + self.contract(F.relu(self.expand(norm(x))).square())


class LookBack(nn.Module):
    """x_t + a x_(t-1) + b x_(t-2), with a and b learned for each channel.

    What hlb-gpt 0.4.1 gets from attention that leans to the near: the last words count from the
    first step, before attention has learned to find them. Unlike a bias it leaves attention fast.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one_back = nn.Parameter(torch.full((width,), 0.5))
        self.two_back = nn.Parameter(torch.full((width,), 0.25))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:  # (B, T, D)
        if cache is None:
            one, two = (F.pad(x, (0, 0, back, 0))[:, : x.shape[1]] for back in (1, 2))
        else:
            seen = cache.before(self, x, 2)
            one, two = seen[:, 1:-1], seen[:, :-2]
        return x + self.one_back.to(x.dtype) * one + self.two_back.to(x.dtype) * two


class Attention(nn.Module):
    """Causal attention with normed queries and keys.

    Args:
        width: D.
        num_heads: H.
        values: Rows of a table with a value for each token, or 0 for none.
    """

    def __init__(self, width: int, num_heads: int, values: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        for layer in (self.query, self.key, self.value):
            nn.init.normal_(layer.weight, std=(0.33 / width) ** 0.5)
        nn.init.zeros_(self.project.weight)
        self.value_table = nn.Embedding(values, width) if values else None
        self.share = nn.Parameter(torch.zeros(())) if values else None

    def forward(
        self, x: Tensor, tokens: Tensor, rotary: Rotary, cache: Cache | None = None
    ) -> Tensor:
        value = self.value(x)
        if self.value_table is not None and self.share is not None:
            value = value + self.share.to(x.dtype) * self.value_table(tokens).to(x.dtype)
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, D / H)
            for part in (self.query(x), self.key(x), value)
        )
        q, k = rotary(norm(q), cache), rotary(norm(k), cache)
        y = causal_attention(q, k, v, cache, self)
        return self.project(y.transpose(1, 2).flatten(2))  # (B, T, D)
