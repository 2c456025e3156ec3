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

from hlbgpt.models.base import require_positive
from hlbgpt.models.kv_cache import KVCache

_MASKED = -1e4  # score of probability 0; an infinity would turn gradients into NaN
_TINY = torch.finfo(torch.float32).tiny


class PointerScores(NamedTuple):
    """Unnormalised log-probabilities of the mixture; float32 but for the tokens.

    Attributes:
        scores: (B, T, L), of copying each token.
        vocab_score: (B, T), of using the vocabulary's distribution.
        tokens: (B, L) int64, the tokens to copy.
    """

    scores: Tensor
    vocab_score: Tensor
    tokens: Tensor

    def select(self, positions: slice) -> "PointerScores":
        """The scores at some of the T positions."""
        return PointerScores(self.scores[:, positions], self.vocab_score[:, positions], self.tokens)

    def mix_log_probs(self, log_probs: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Log-probabilities (B, T, V) of the mixture, from those of the vocabulary.

        `tokens` (B, L) are the indices into V of the tokens to copy, if not the tokens themselves.
        """
        log_share, log_total = self._log_share_and_total()
        copied = (self.scores - log_total).exp()
        index = (self.tokens if tokens is None else tokens)[:, None].expand_as(copied)
        mixture = (log_probs + log_share).exp().scatter_add(-1, index, copied)
        return mixture.clamp(min=_TINY).log()

    def mix_losses(self, losses: Tensor, targets: Tensor) -> Tensor:
        """Losses (B, T) of the mixture, from those of the vocabulary; exact for tiny probabilities.

        Losses where the target (B, T) is -1 are meaningless.
        """
        log_share, log_total = self._log_share_and_total()
        hit = self.tokens[:, None] == targets[..., None]
        copied = self.scores.where(hit, _MASKED).logsumexp(-1, keepdim=True) - log_total
        return -torch.logaddexp(log_share - losses[..., None], copied)[..., 0]

    def _log_share_and_total(self) -> tuple[Tensor, Tensor]:
        """Logarithms of the vocabulary's share and of the normalisation, both (B, T, 1)."""
        vocab_score = self.vocab_score[..., None]
        log_total = torch.logaddexp(vocab_score, self.scores.logsumexp(-1, keepdim=True))
        return vocab_score - log_total, log_total


class Pointer(nn.Module):
    """Scores every earlier token as a candidate for the next one.

    A score is the product of a query, from the features of the predicting token, and a key, from
    the features of the candidate. It decreases with distance, and gets a bonus if the tokens before
    the candidate equal the latest tokens. The bonus depends on the features, because a match of
    "the" means little.

    Args:
        width: D.
        dim: d.
        ngrams: Maximum number of matching tokens, each with a bonus of its own.

    Raises:
        ValueError: `dim` is below 1 or `ngrams` is negative.
    """

    def __init__(self, width: int, dim: int, ngrams: int = 2) -> None:
        super().__init__()
        require_positive(pointer_dim=dim)
        if ngrams < 0:
            raise ValueError(f"model.net.pointer_ngrams: {ngrams} is negative; set it to 0 or more")
        # Also gives the vocabulary's score and the bonuses.
        self.q_proj = nn.Linear(width, dim + 1 + ngrams, bias=False)
        self.k_proj = nn.Linear(width, dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.log_decay = nn.Parameter(torch.tensor(-math.log(200.0)))  # of a score, per token
        self.vocab_score = nn.Parameter(torch.tensor(7.5))
        self.bonus = nn.ParameterList(nn.Parameter(torch.tensor(2.0)) for _ in range(ngrams))
        nn.init.zeros_(self.q_proj.weight)
        nn.init.normal_(self.k_proj.weight, std=width**-0.5)

    def flops_per_token(self, sequence_length: int) -> float:
        """FLOPs of the scores, without those of `nn.Linear`; see `Network.flops_per_token`."""
        return 6.0 * sequence_length * self.k_proj.out_features

    def forward(self, x: Tensor, tokens: Tensor, kv_cache: KVCache | None = None) -> PointerScores:
        """Scores of all tokens, from features `x` (B, T, D) of `tokens` (B, T)."""
        k, ngrams = self.k_proj(x), len(self.bonus)  # (B, T, d)
        q, vocab_score, bonus = self.q_proj(x).float().split([k.shape[-1], 1, ngrams], dim=-1)
        q = (q + self.q_bias).to(k.dtype)
        if kv_cache is None:
            position = torch.arange(tokens.shape[1], device=x.device)
            distance = position - position[:, None]  # (T, T)
            recent, candidates = F.pad(tokens, (ngrams, 0), value=-1), tokens
        else:
            distance = kv_cache.distance  # (B, T, L)
            recent = kv_cache.shift(self, tokens, ngrams)
            k = kv_cache.append((self, "k"), k)
            candidates = kv_cache.append((self, "tokens"), tokens)
        scores = (q @ k.mT).float() / k.shape[-1] ** 0.5 + self.log_decay.exp() * distance
        scores = scores + self._ngram_bonus(bonus, candidates, recent)
        scores = scores.where(distance <= 0, _MASKED)  # (B, T, L)
        return PointerScores(scores, vocab_score[..., 0] + self.vocab_score, candidates)

    def _ngram_bonus(self, bonus: Tensor, candidates: Tensor, recent: Tensor) -> Tensor | float:
        """The bonus (B, T, L) for candidates (B, L) whose preceding tokens equal the recent ones.

        `bonus` (B, T, ngrams) is added to the learned bonuses; `recent` (B, ngrams + T) holds the
        new tokens and the `ngrams` before them.
        """
        total, matches = 0.0, None
        for back, learned in enumerate(self.bonus):
            preceding = F.pad(candidates, (back + 1, 0), value=-1)[:, : candidates.shape[1]]
            end = recent.shape[1] - back
            latest = recent[:, end - bonus.shape[1] : end]  # (B, T)
            match = preceding[:, None] == latest[..., None]  # (B, T, L)
            matches = match if matches is None else matches & match
            total = total + (learned + bonus[..., back, None]) * matches
        return total
