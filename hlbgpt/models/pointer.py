"""A pointer network: a share of each prediction goes to the tokens that came before.

A word that appeared once is likely to appear again, and a small GPT needs millions of tokens to
learn this. The pointer has it built in: attention weights are the probabilities of the tokens
attended to, mixed with those of the vocabulary. The mixture is properly normalised, and exact in
training and evaluation. Sources: pointer sentinel mixture models (arXiv 1609.07843), the continuous
cache (arXiv 1612.04426), and induction heads (arXiv 2209.11895) for the bonus for repeated n-grams.

Shapes: B sequences, T tokens, L tokens including those in the KV cache, D width, d size of queries
and keys, V vocabulary.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlbgpt.models.base import require_not_negative
from hlbgpt.models.kv_cache import KVCache, earlier, token_distance

_MASKED = -1e4  # score of probability 0; an infinity would turn gradients into NaN


class PointerScores(NamedTuple):
    """Normalised log-probabilities, float32, of the mixture's parts.

    Attributes:
        copy: (B, T, L), of copying each token.
        vocab: (B, T), of using the vocabulary's distribution.
        tokens: (B, L) int64, the tokens to copy.
    """

    copy: Tensor
    vocab: Tensor
    tokens: Tensor

    def select(self, positions: slice) -> "PointerScores":
        """The scores at some of the T positions."""
        return PointerScores(self.copy[:, positions], self.vocab[:, positions], self.tokens)

    def mix_losses(self, losses: Tensor, targets: Tensor) -> Tensor:
        """Add the copies of targets (B, T) to losses (B, T) that include the vocabulary's share.

        Exact for tiny probabilities; meaningless where the target is -1.
        """
        hit = self.tokens[:, None] == targets[..., None]
        copied = self.copy.where(hit, _MASKED).logsumexp(-1)
        return -torch.logaddexp(-losses, copied)

    def mix_probs(self, log_probs: Tensor, index: Tensor) -> Tensor:
        """Add all copies to log-probabilities (B, T, V) that include the vocabulary's share.

        `index` (B, L) is the place in V of each of the tokens to copy. Returns probabilities.
        """
        return log_probs.exp().scatter_add(-1, index[:, None].expand_as(self.copy), self.copy.exp())


class Pointer(nn.Module):
    """Scores every earlier token as a candidate for the next one.

    A score is the product of a query, from the features of the predicting token, and a key, from
    the features of the candidate. It decreases with distance, and gets a bonus for each of the
    tokens before the candidate that equals the latest ones. The bonus depends on the features,
    because a match of "the" means little.

    Args:
        width: D.
        dim: d.
        ngrams: Maximum number of matching tokens, each with a bonus of its own.
    """

    def __init__(self, width: int, dim: int, ngrams: int = 2) -> None:
        super().__init__()
        require_not_negative(pointer_dim=dim, pointer_ngrams=ngrams)
        # Also gives the vocabulary's score and the bonuses.
        self.q_proj = nn.Linear(width, dim + 1 + ngrams, bias=False)
        self.k_proj = nn.Linear(width, dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.log_decay = nn.Parameter(torch.tensor([-math.log(200.0)]))  # of a score, per token
        self.vocab_score = nn.Parameter(torch.tensor([7.5]))
        self.bonus = nn.ParameterList(nn.Parameter(torch.tensor([2.0])) for _ in range(ngrams))
        nn.init.zeros_(self.q_proj.weight)
        nn.init.normal_(self.k_proj.weight, std=width**-0.5)

    def forward(self, x: Tensor, tokens: Tensor, kv_cache: KVCache | None = None) -> PointerScores:
        """Scores of all tokens, from features `x` (B, T, D) of `tokens` (B, T)."""
        k, ngrams = self.k_proj(x), len(self.bonus)  # (B, T, d)
        q, vocab, bonus = self.q_proj(x).float().split([k.shape[-1], 1, ngrams], dim=-1)
        q, vocab = (q + self.q_bias).to(k.dtype), vocab + self.vocab_score
        distance = token_distance(tokens, kv_cache)
        latest = [tokens, *earlier(tokens, ngrams, kv_cache, (self, "latest"))]  # (B, T) each
        if kv_cache is not None:
            k, tokens = kv_cache.append((self, "k"), k), kv_cache.append((self, "tokens"), tokens)
        # Expanded to rows, so that its gradient is summed over each row as it is computed.
        decay = self.log_decay.exp().expand(*x.shape[:2], 1)
        scores = (q @ k.mT).float() / k.shape[-1] ** 0.5 + decay * distance
        matches = distance <= 0  # that the last tokens before a candidate equal the latest ones
        for back, learned in enumerate(self.bonus):
            preceding = F.pad(tokens, (back + 1, 0), value=-1)[:, : tokens.shape[1]]  # (B, L)
            matches = matches & (preceding[:, None] == latest[back][..., None])  # (B, T, L)
            scores = scores + (learned + bonus[..., back, None]) * matches
        scores = scores.where(distance <= 0, _MASKED)
        total = torch.logaddexp(vocab, scores.logsumexp(-1, keepdim=True))
        return PointerScores(scores - total, (vocab - total)[..., 0], tokens)
