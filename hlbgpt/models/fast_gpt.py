"""The fast GPT: what public speedruns found and our own runs confirmed.

What is unusual about it:
- RMSNorm without weights, also of queries and keys (QK norm)
- rotary positions, of which half the frequencies are zero
- ReLU² in the MLP, no biases
- every block adds the embedding again, with learned factors (x0 shortcut)
- attention and MLP read each token mixed with the two before it (token shift)
- optionally, the last blocks add an embedding of the token to the values of attention
- optionally, an embedding of pairs of tokens
- optionally, tokens that are spelled alike share a part of embedding and LM head, see `subwords.py`
- the residual stream has the precision of autocast
- an untied LM head with a softcap, frequency clusters and a bias from the token counts, see
  `adaptive_softmax.py`
- optionally, the input has a learned projection of what the LM head knows about the token
- optionally, a share of each prediction goes to earlier tokens, see `pointer.py`; a schedule may
  then add a second training loss, without this share
- optionally, a share goes to what n-grams counted in the training text predict, see `ngrams.py`
Sources: github.com/KellerJordan/modded-nanogpt, github.com/karpathy/nanochat.

Shapes: B sequences, T tokens, D width, H heads, V vocabulary.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlbgpt.models.adaptive_softmax import AdaptiveSoftmax
from hlbgpt.models.base import (
    Network,
    TextChunks,
    require,
    require_not_negative,
    require_positive,
)
from hlbgpt.models.kv_cache import KVCache, causal_attention, earlier
from hlbgpt.models.lm_head import TokenScores
from hlbgpt.models.ngrams import NgramMixture
from hlbgpt.models.pointer import Pointer
from hlbgpt.models.subwords import NUM_FEATURES, SubwordEmbedding, subword_features

if torch.cuda.is_available() and find_spec("triton"):  # which some builds of torch lack
    from hlbgpt.models.fused_mlp import fused_mlp


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without weights."""
    return F.rms_norm(x, (x.shape[-1],))


class FastGPT(Network):
    """A decoder that learns much from few tokens, at the learning rates of `MuonAdamW`.

    Args:
        vocab_size: V, at least the tokenizer's. A GPU is faster if it, and with `cutoffs` the
            number of classes of each cluster, is a multiple of 64.
        max_sequence_length: Longest sequence.
        width: D, of the residual stream.
        num_heads: H, attention heads of D / H each.
        num_blocks: Number of blocks, each attention and an MLP of width 4 D.
        cutoffs: Frequency ranks at which rare clusters of the LM head begin; [] for a full softmax.
            With K of them, the first cluster has K more classes; see `vocab_size`.
        capacity: For each rare cluster the largest fraction of a batch's targets that a training
            step computes; see `AdaptiveSoftmax`.
        softcap: Limits logits to ± this with tanh; 0 for no limit.
        value_embed_blocks: Number of last blocks that add an embedding of the token to the values.
        bigram_buckets: Rows of the embedding of pairs of tokens, found by a hash; 0 for none.
        subword_buckets: Rows of the embedding of spelling, and of that which adds to the weights of
            the LM head; 0 for none.
        head_input: Whether the input also has a learned projection of each token's weights in the
            LM head, which get no gradient from it. These weights learn what comes before a token,
            and its embedding what comes after.
        token_shift: Whether attention and MLP read each token mixed with the two before it.
        pointer_dim: Size of the pointer's queries and keys; 0 for no pointer.
        pointer_ngrams: Maximum number of matching tokens for which the pointer gives a bonus.
        ngram_order: Longest n-gram that is counted in the training text and mixed in, 2 or more; 0
            for none.
        ngram_rows: Maximum number of n-grams of each length; 20 bytes each.
        fused_mlp: Whether a compiled network in bf16 on a GPU computes its MLPs by
            `fused_mlp.py`, which moves fewer bytes.
        loss_chunk_tokens: Number of tokens whose logits exist in float32 at a time; 0 for all. It
            changes memory and speed, not the loss.
    """

    features: Tensor

    supports_kv_cache = True
    needs_token_counts = True

    def __init__(
        self,
        vocab_size: int = 50304,
        max_sequence_length: int = 1024,
        width: int = 384,
        num_heads: int = 3,
        num_blocks: int = 8,
        cutoffs: list[int] = [],  # noqa: B006 (never changed)
        capacity: list[float] | None = None,
        softcap: float = 15.0,
        value_embed_blocks: int = 0,
        bigram_buckets: int = 0,
        subword_buckets: int = 0,
        head_input: bool = False,
        token_shift: bool = True,
        pointer_dim: int = 0,
        pointer_ngrams: int = 2,
        ngram_order: int = 0,
        ngram_rows: int = 2**24,
        fused_mlp: bool = False,
        loss_chunk_tokens: int = 0,
    ) -> None:
        super().__init__()
        require_positive(vocab_size=vocab_size, max_sequence_length=max_sequence_length)
        require_not_negative(softcap=softcap, bigram_buckets=bigram_buckets)
        require(
            subword_buckets == 0 or subword_buckets > 1,
            f"subword_buckets: {subword_buckets} is neither 0 nor 2 or more; change it",
        )
        require_not_negative(loss_chunk_tokens=loss_chunk_tokens)
        require(
            0 <= value_embed_blocks <= num_blocks,
            f"value_embed_blocks: {value_embed_blocks} is not from 0 to num_blocks {num_blocks}",
        )
        require_positive(width=width, num_heads=num_heads, num_blocks=num_blocks)
        require(
            width % (2 * num_heads) == 0,
            f"width: {width} is not divisible by twice num_heads {num_heads}, which rotary "
            "positions require; change one of them",
        )
        self.vocab_size, self.max_sequence_length = vocab_size, max_sequence_length
        self.embedding = nn.Embedding(vocab_size, width)
        self.bigram_embedding = BigramEmbedding(bigram_buckets, width) if bigram_buckets else None
        self.needs_spelling, self.subword_embedding = subword_buckets > 0, None
        if subword_buckets:
            self.subword_embedding = SubwordEmbedding(subword_buckets, width, std=0.3)
            # In checkpoints, so that a trained network does not need the tokenizer.
            features = torch.zeros(vocab_size, NUM_FEATURES, dtype=torch.int64)
            self.register_buffer("features", features)
        self.head_proj = None
        if head_input:
            self.head_proj = nn.Linear(width, width, bias=False)
            nn.init.zeros_(self.head_proj.weight)
        self.rotary = Rotary(width // num_heads, max_sequence_length)
        first = num_blocks - value_embed_blocks
        self.blocks = nn.ModuleList(
            Block(width, num_heads, token_shift, vocab_size if i >= first else 0, fused_mlp)
            for i in range(num_blocks)
        )
        self.pointer = Pointer(width, pointer_dim, pointer_ngrams) if pointer_dim else None
        self.needs_text, self.ngrams = ngram_order > 0, None
        if ngram_order:
            self.ngrams = NgramMixture(vocab_size, width, ngram_order, ngram_rows)
        self.lm_head = AdaptiveSoftmax(
            width,
            vocab_size,
            cutoffs,
            capacity,
            subword_buckets=subword_buckets,
            softcap=softcap,
            chunk_tokens=loss_chunk_tokens,
        )

    @property
    def vocab_loss_weight(self) -> Tensor | None:
        return None if self.pointer is None else self.lm_head.vocab_loss_weight

    @property
    def counted_tokens(self) -> int:
        return 0 if self.ngrams is None else int(self.ngrams.counted_tokens)

    def init_from_spelling(self, spelling: Sequence[bytes]) -> None:
        if self.subword_embedding is None:
            return
        features = subword_features(spelling, len(self.subword_embedding.weight))
        self.features[: len(features)] = features.to(self.features.device)
        self.lm_head.init_from_spelling(features)

    def init_from_token_counts(self, counts: Tensor) -> None:
        self.lm_head.init_from_token_counts(counts)

    def init_from_text(self, chunks: TextChunks) -> None:
        if self.ngrams is not None:
            self.ngrams.count(chunks)

    def flops_per_token(self, sequence_length: int) -> float:
        """See `Network`; a token of attention takes 4 D forward, and one of the pointer 2 d."""
        per_token = 4 * len(self.blocks) * self.embedding.embedding_dim
        if self.pointer is not None:
            per_token += 2 * self.pointer.k_proj.out_features
        weights = super().flops_per_token(sequence_length) + self.lm_head.flops_per_token()
        return weights + 3 * sequence_length * per_token

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        per_token: bool = False,
        kv_cache: KVCache | None = None,
    ) -> Tensor | TokenScores:
        if kv_cache is not None:
            kv_cache.prepare(tokens)
        x = self.embedding(tokens)
        if self.subword_embedding is not None:
            x = x + self.subword_embedding(self.features[tokens])
        if torch.is_autocast_enabled(x.device.type):  # which does not cast embeddings
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = norm(x)
        if self.bigram_embedding is not None:
            x = x + self.bigram_embedding(tokens, kv_cache).to(x.dtype)
        if self.head_proj is not None:
            with torch.no_grad():
                weights = self.lm_head.token_weights(tokens)
            x = x + self.head_proj(norm(weights).to(x.dtype))
        x0 = x  # (B, T, D)
        for block in self.blocks:
            x = block(x, x0, tokens, self.rotary, kv_cache)
        x = norm(x)
        pointer = None if self.pointer is None else self.pointer(x, tokens, kv_cache)
        ngrams = None if self.ngrams is None else self.ngrams(x, tokens, kv_cache)
        if kv_cache is not None:
            x, last = kv_cache.advance(x), slice(-1, None)  # (B, 1, D)
            pointer, ngrams = pointer and pointer.select(last), ngrams and ngrams.select(last)
        return self.lm_head(x, targets, pointer, ngrams, per_token=per_token, kv_cache=kv_cache)


class BigramEmbedding(nn.Embedding):
    """Embedding (B, T, D) of each token (B, T) together with the one before it, by a hash."""

    def __init__(self, buckets: int, width: int) -> None:
        super().__init__(buckets, width)
        nn.init.zeros_(self.weight)

    def forward(self, tokens: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        (previous,) = earlier(tokens, 1, kv_cache, self)
        return super().forward((previous * 1_000_003 + tokens * 8_191) % self.num_embeddings)


class Rotary(nn.Module):
    """Rotary positions (arXiv 2104.09864) with base 1024; half of the frequencies are zero."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_length: int) -> None:
        super().__init__()
        frequency = (1 / 1024) ** torch.linspace(0, 1, head_dim // 4)
        frequency = torch.cat([frequency, torch.zeros(head_dim // 2 - head_dim // 4)])
        angle = torch.outer(torch.arange(max_length), frequency)
        cos, sin = angle.cos(), angle.sin()
        self.register_buffer("cos", torch.cat([cos, cos], dim=-1)[:, None], persistent=False)
        self.register_buffer("sin", torch.cat([sin, -sin], dim=-1)[:, None], persistent=False)

    def forward(self, x: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        """Rotate queries or keys `x` (B, T, H, D / H)."""
        index = slice(x.shape[1]) if kv_cache is None else kv_cache.positions
        cos, sin = self.cos[index].to(x.dtype), self.sin[index].to(x.dtype)  # (T, 1, D / H)
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([right, left], dim=-1) * sin


class Block(nn.Module):
    def __init__(
        self,
        width: int,
        num_heads: int,
        token_shift: bool,
        value_embed_size: int,
        fused_mlp: bool,
    ) -> None:
        super().__init__()
        # Separate scalars, because slices of one tensor have had wrong gradients when compiled.
        self.resid_lambda = nn.Parameter(torch.ones(1))
        self.x0_lambda = nn.Parameter(torch.zeros(1))
        self.token_shift = TokenShift(width, 0.5, 0.25) if token_shift else None
        self.mlp_token_shift = TokenShift(width, 0.25, 0.0) if token_shift else None
        self.attention = Attention(width, num_heads)
        self.value_embed = nn.Embedding(value_embed_size, width) if value_embed_size else None
        self.ve_lambda = nn.Parameter(torch.zeros(1)) if value_embed_size else None
        self.mlp = MLP(width, fused_mlp)

    def forward(
        self, x: Tensor, x0: Tensor, tokens: Tensor, rotary: Rotary, kv_cache: KVCache | None
    ) -> Tensor:
        x = self.resid_lambda.to(x.dtype) * x + self.x0_lambda.to(x.dtype) * x0
        y = norm(x)  # (B, T, D)
        if self.token_shift is not None:
            y = self.token_shift(y, kv_cache)
        ve = None
        if self.value_embed is not None and self.ve_lambda is not None:
            ve = self.ve_lambda.to(x.dtype) * self.value_embed(tokens).to(x.dtype)  # (B, T, D)
        x = x + self.attention(y, ve, rotary, kv_cache)
        y = norm(x)
        if self.mlp_token_shift is not None:
            y = self.mlp_token_shift(y, kv_cache)
        return x + self.mlp(y)


class TokenShift(nn.Module):
    """x_t + a x_(t-1) + b x_(t-2), with a and b learned for each channel.

    It lets a block use the last tokens from the first step on, as the distance bias of hlb-gpt
    0.4.1 does, but keeps the fast attention kernels.
    """

    def __init__(self, width: int, one_back: float, two_back: float) -> None:
        super().__init__()
        self.one_back = nn.Parameter(torch.full((width,), one_back))
        self.two_back = nn.Parameter(torch.full((width,), two_back))

    def forward(self, x: Tensor, kv_cache: KVCache | None = None) -> Tensor:  # (B, T, D)
        one, two = earlier(x, 2, kv_cache, self)
        return x + self.one_back.to(x.dtype) * one + self.two_back.to(x.dtype) * two


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(layer.weight, std=(0.33 / width) ** 0.5)
        nn.init.zeros_(self.o_proj.weight)

    def forward(
        self, x: Tensor, ve: Tensor | None, rotary: Rotary, kv_cache: KVCache | None = None
    ) -> Tensor:
        # Queries and keys from one product, (B, T, 2 H, D / H); Muon updates each matrix by itself.
        qk = F.linear(x, torch.cat([self.q_proj.weight, self.k_proj.weight]))
        qk = rotary(norm(qk.unflatten(-1, (2 * self.num_heads, -1))), kv_cache)
        v = self.v_proj(x)
        if ve is not None:
            v = v + ve
        # Transposed last, so that the result of attention has the layout that o_proj reads.
        q, k, v = (
            part.transpose(1, 2)  # (B, H, T, D / H)
            for part in (*qk.chunk(2, dim=2), v.unflatten(-1, (self.num_heads, -1)))
        )
        y = causal_attention(q, k, v, kv_cache, self)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, 4 * width, bias=False)
        self.down_proj = nn.Linear(4 * width, width, bias=False)
        self.fused = fused
        nn.init.normal_(self.up_proj.weight, std=(0.33 / width) ** 0.5)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        # Compiled only: elsewhere a GPU needs no compiler, and here is what to compare with.
        if self.fused and torch.compiler.is_compiling() and x.is_cuda and x.dtype == torch.bfloat16:
            return fused_mlp(x, self.up_proj.weight, self.down_proj.weight)
        return self.down_proj(F.relu(self.up_proj(x)).square())  # (B, T, D)
