"""Pointing at what was read: a share of each prediction goes to the tokens of the window.

A word that came once comes again. A small GPT needs millions of tokens to find out; here it is
built in: an attention whose weights are probabilities of the very tokens attended to, mixed with
those of the vocabulary. The mixture is a properly normalised distribution, exact in training and
evaluation. Sources: pointer sentinel mixtures (arXiv 1609.07843), which came with WikiText, and the
continuous cache (arXiv 1612.04426); the bonus for repeats is the induction heads of arXiv
2209.11895, given from the start.

Shapes: B sequences, T tokens, L tokens of a sequence with those in the cache, D width,
V vocabulary.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlbgpt.models.kv_cache import Cache
from hlbgpt.utils.errors import InputError, require_positive

_NEVER = -1e4  # score of no probability; an infinity would turn gradients into NaN
_TINY = torch.finfo(torch.float32).tiny


class Pointed(NamedTuple):
    """Where T tokens of B sequences point; float32 but for the tokens.

    Attributes:
        scores: (B, T, L), of each token read; their exponentials are weights.
        vocabulary: (B, T), the same of the vocabulary as a whole.
        tokens: (B, L) int64, those read.
    """

    scores: Tensor
    vocabulary: Tensor
    tokens: Tensor

    def rows(self, rows: slice) -> "Pointed":
        """Those of some of the T tokens."""
        return Pointed(self.scores[:, rows], self.vocabulary[:, rows], self.tokens)

    def last(self, count: int) -> "Pointed":
        """Those of the last `count` of the T tokens."""
        return self.rows(slice(self.scores.shape[1] - count, None))

    def losses(self, losses: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of the mixture, from `losses` (B, T) of the vocabulary's part.

        A target (B, T) of -1 has no loss that means anything.
        """
        hit = self.tokens[:, None] == targets[..., None]
        copied = self.scores.where(hit, _NEVER).logsumexp(-1)
        return self._total() - torch.logaddexp(self.vocabulary - losses, copied)

    def probabilities(self, likely: Tensor) -> Tensor:
        """Of the mixture (B, T, V), from log-probabilities (B, T, V) of the vocabulary's part."""
        mixed = (likely + self.share()[..., None]).exp()
        return mixed.scatter_add(-1, *self._copied()).clamp(min=_TINY)

    def share(self) -> Tensor:
        """Logarithm of the vocabulary's share (B, T)."""
        return self.vocabulary - self._total()

    def add_to(self, probabilities: Tensor, place: Tensor) -> None:
        """Add the rest to `probabilities` (B, T, ...); a token's are at its `place` (V,)."""
        tokens, copied = self._copied()
        probabilities.scatter_add_(-1, place[tokens], copied)

    def _copied(self) -> tuple[Tensor, Tensor]:
        """Tokens read and their probabilities, both (B, T, L)."""
        copied = (self.scores - self._total()[..., None]).exp()
        return self.tokens[:, None].expand_as(copied), copied

    def _total(self) -> Tensor:
        return torch.logaddexp(self.vocabulary, self.scores.logsumexp(-1))


class Pointer(nn.Module):
    """Scores of all tokens read, as candidates for the next one.

    A score is the product of a query, made of the features where it is asked, and a key, of those
    of the token read; less what it fades with distance; and more where the tokens before it are
    those before the one to come. How much more depends on the features too, for that "the" came
    before says little.

    Args:
        width: D.
        size: d, of queries and keys.
        repeats: How many tokens before may agree, each with a bonus of its own.

    Raises:
        InputError: a size below 1, or fewer than no repeats.
    """

    def __init__(self, width: int, size: int, repeats: int = 2) -> None:
        super().__init__()
        require_positive("model.net ", pointer_size=size)
        if repeats < 0:
            raise InputError(
                f"model.net pointer_repeats: {repeats} is negative; set it to 0 or more"
            )
        # A query, the vocabulary's score, and the bonuses.
        self.query = nn.Linear(width, size + 1 + repeats, bias=False)
        self.key = nn.Linear(width, size, bias=False)
        self.worth = nn.Parameter(torch.zeros(size))  # of a token wherever it is asked for
        self.fade = nn.Parameter(torch.tensor(-math.log(200.0)))  # log of the rate per token
        self.vocabulary = nn.Parameter(torch.tensor(7.5))
        self.bonus = nn.ParameterList(nn.Parameter(torch.tensor(2.0)) for _ in range(repeats))
        nn.init.zeros_(self.query.weight)
        nn.init.normal_(self.key.weight, std=width**-0.5)

    def flops_per_token(self, sequence_length: int) -> float:
        """Of the scores, as `Network.flops_per_token`; its `nn.Linear` are counted there."""
        return 6.0 * sequence_length * self.key.out_features

    def forward(self, x: Tensor, tokens: Tensor, cache: Cache | None = None) -> Pointed:
        """Where features `x` (B, T, D) of `tokens` (B, T) point."""
        key, room = self.key(x), len(self.bonus)
        query, vocabulary, bonus = self.query(x).float().split([key.shape[-1], 1, room], dim=-1)
        query = (query + self.worth).to(key.dtype)
        if cache is None:
            place = torch.arange(tokens.shape[1], device=x.device)
            distance, before = place - place[:, None], F.pad(tokens, (room, 0), value=-1)
            seen = tokens
        else:
            distance, before = cache.distance, cache.before(self, tokens, room)
            key = cache.extend((self, "keys"), key)
            seen = cache.extend((self, "tokens"), tokens)
        scores = (query @ key.mT).float() / key.shape[-1] ** 0.5 + self.fade.exp() * distance
        scores = scores + self._bonuses(bonus, seen, before)
        scores = scores.where(distance <= 0, _NEVER)
        return Pointed(scores, vocabulary[..., 0] + self.vocabulary, seen)

    def _bonuses(self, more: Tensor, seen: Tensor, before: Tensor) -> Tensor | float:
        """(B, T, L), from tokens `seen` (B, L), and those asking with some `before` them.

        `more` (B, T, R) is what features add to the R bonuses.
        """
        total, agree = 0.0, None
        for back, bonus in enumerate(self.bonus):
            left = F.pad(seen, (back + 1, 0), value=-1)[:, : seen.shape[1]]  # (B, L)
            end = before.shape[1] - back
            asking = before[:, end - more.shape[1] : end]  # (B, T)
            same = left[:, None] == asking[..., None]
            agree = same if agree is None else agree & same
            total = total + (bonus + more[..., back, None]) * agree
        return total
