"""Adaptive softmax (Grave et al., arXiv 1609.04309): rare tokens cost only where they come.

Tokens are ranked by how often the training split has them, and cut into clusters. The first one, of
the commonest, also holds a class for each of the others; a token of a rare cluster has the
probability of its cluster times that within the cluster. All of it is one properly normalised
distribution over the vocabulary. Unlike in the paper, rare clusters keep the full width.

Shapes: B sequences, T tokens, N = B x T, D width, V vocabulary, K rare clusters.
"""

import itertools
import math

import torch
from torch import Tensor, nn

from hlbgpt.models.lm_head import IGNORE, Classes, TokenScores, exponentials_
from hlbgpt.models.pointer import Pointed
from hlbgpt.utils.errors import InputError


class AdaptiveHead(nn.Module):
    """Logits, log-probabilities and loss of a vocabulary in 1 + K clusters.

    Args:
        width: D.
        vocab_size: V.
        cutoffs: Ranks at which the rare clusters begin, rising; empty for the full softmax.
        shares: For each rare cluster the greatest share of a batch's targets that a training step
            has room for, which keeps its shapes the same; None for exactly as many as there are,
            where shapes may change. Targets beyond are left out of the loss of their cluster, not
            of the choice of clusters.
        softcap: Logits are kept within ± this; 0 for no cap.
        chunk: Tokens whose logits, if over the whole vocabulary, exist in full precision at a
            time; 0 for all.
        unigram_bias: Whether logits start from the logarithm of how often each token comes.
    """

    rank: Tensor
    log_prior: Tensor
    _cuts: Tensor

    def __init__(
        self,
        width: int,
        vocab_size: int,
        *,
        cutoffs: tuple[int, ...] = (),
        shares: tuple[float, ...] | None = None,
        softcap: float = 0.0,
        chunk: int = 0,
        unigram_bias: bool = True,
    ) -> None:
        super().__init__()
        edges = (0, *cutoffs, vocab_size)
        if any(low >= high for low, high in itertools.pairwise(edges)):
            raise InputError(
                f"model.net cutoffs: {list(cutoffs)} do not rise from 1 to below vocab_size "
                f"{vocab_size}; change them"
            )
        if shares is not None and len(shares) != len(cutoffs):
            raise InputError(
                f"model.net shares: {len(shares)} given for {len(cutoffs)} cutoffs; give as many"
            )
        if shares is not None and not all(0 < share <= 1 for share in shares):
            raise InputError(f"model.net shares: {list(shares)} are not all above 0 and at most 1")
        self.vocab_size, self.edges, self.shares = vocab_size, edges, shares
        self.softcap, self.chunk, self.unigram_bias = softcap, chunk, unigram_bias
        # By rank, then a row for each rare cluster.
        self.weight = nn.Parameter(torch.zeros(vocab_size + len(cutoffs), width))
        self.register_buffer("_cuts", torch.tensor(cutoffs, dtype=torch.int64), persistent=False)
        self.register_buffer("rank", torch.arange(vocab_size))  # of each token
        self.register_buffer("log_prior", torch.zeros(vocab_size + len(cutoffs)))

    def use_token_counts(self, counts: Tensor) -> None:
        """Rank the tokens by `counts` (at most V,); to be called before the first step."""
        # On the host, for not every device has double precision.
        known = torch.zeros(self.vocab_size, dtype=torch.float64, device="cpu")
        known[: len(counts)] = counts.cpu()
        order = known.argsort(descending=True, stable=True)
        self.rank.copy_(order.argsort())
        # A token that never came is taken to have come half a time.
        prior = ((known[order] + 0.5) / (known + 0.5).sum()).log()
        clusters = [prior[low:high].logsumexp(0) for low, high in self._rare()]
        self.log_prior.copy_(torch.cat([prior, *(cluster[None] for cluster in clusters)]).float())

    def expected_shares(self) -> tuple[float, ...]:
        """For each rare cluster the share of a batch's targets that a step computes: `shares`.

        Without them, the share of the training text; before `use_token_counts`, that which Zipf's
        law gives, by which a token comes in proportion to 1 / rank. Waits for the device.
        """
        if self.shares is not None:
            return self.shares
        if not self.log_prior.is_meta and self.log_prior.any():
            return tuple(self.log_prior[self.vocab_size :].exp().tolist())
        whole = math.log(self.vocab_size) + 0.5772  # the harmonic number, by Euler's constant
        return tuple(math.log(high / low) / whole for low, high in self._rare())

    def flops_per_token(self) -> float:
        """As `Network.flops_per_token`; a rare cluster counts with its expected share."""
        shares = self.expected_shares()
        sizes = (high - low for low, high in self._rare())
        rare = sum(share * size for share, size in zip(shares, sizes, strict=True))
        return 6.0 * self.weight.shape[1] * (self.edges[1] + len(shares) + rare)

    def _rare(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise(self.edges[1:]))

    def _classes(self, *rows: slice) -> Classes:
        bias = torch.cat([self.log_prior[part] for part in rows]) if self.unigram_bias else None
        weight = torch.cat([self.weight[part] for part in rows])
        # As many logits as `chunk` tokens have over the whole vocabulary.
        chunk = self.chunk and max(1, self.chunk * self.vocab_size // len(weight))
        return Classes(weight, bias, self.softcap, chunk)

    def _all(self) -> Classes:
        """All clusters at once: `_classes` would copy the weights, which for a token is slow."""
        return Classes(self.weight, self.log_prior if self.unigram_bias else None, self.softcap)

    def _first(self) -> Classes:
        return self._classes(slice(0, self.edges[1]), slice(self.vocab_size, None))

    def log_probabilities(self, x: Tensor, pointed: Pointed | None = None) -> Tensor:
        """(B, T, V) in the order of the vocabulary, float32, of features `x` (B, T, D)."""
        likely = self._ranked(x)[..., self.rank]
        return likely if pointed is None else pointed.probabilities(likely).log()

    def _ranked(self, x: Tensor) -> Tensor:
        """Log-probabilities (..., V) in the order of ranks."""
        logits, common = self._all().logits(x).float(), self.edges[1]
        first = torch.cat([logits[..., :common], logits[..., self.vocab_size :]], dim=-1)
        first = first.log_softmax(-1)
        parts = [first[..., :common]]
        for number, (low, high) in enumerate(self._rare()):
            within = logits[..., low:high].log_softmax(-1)
            parts.append(within + first[..., common + number, None])
        return torch.cat(parts, dim=-1)

    def forward(
        self,
        x: Tensor,
        targets: Tensor,
        pointed: Pointed | None = None,
        *,
        per_token: bool = False,
    ) -> Tensor | TokenScores:
        """Mean loss of `x` (B, T, D) against `targets` (B, T), or `TokenScores`; as `score`.

        With `pointed`, of the mixture of the vocabulary and the tokens pointed at.
        """
        if per_token:
            return self._scores(x, targets, pointed)
        losses, counted = self.losses(x, targets), targets >= 0
        if pointed is not None:
            losses = pointed.losses(losses, targets).where(counted, 0.0)
        return losses.sum() / counted.sum()

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Of each token (B, T) in nats, float32; 0 where the target is -1."""
        flat, ranks = x.flatten(0, 1), self._ranks(targets)
        choice, cluster = self._choices(ranks)
        losses = self._first().losses(flat, choice)
        for number, (low, high) in enumerate(self._rare()):
            place = self._places(cluster == number + 1, number)
            # Places past the end are room that is not needed.
            there = place < len(flat)
            place = place.clamp(max=len(flat) - 1)
            wanted = torch.where(there, ranks[place] - low, IGNORE)
            within = self._classes(slice(low, high)).losses(flat[place], wanted)
            losses = losses.index_add(0, place, within)
        return losses.view_as(targets)

    def _ranks(self, targets: Tensor) -> Tensor:
        """(N,) of targets (B, T), in which -1 stays."""
        labels = targets.flatten()
        return torch.where(labels >= 0, self.rank[labels.clamp(min=0)], IGNORE)

    def _choices(self, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """For `ranks` (N,) the class in the first cluster, and the number of the cluster."""
        cluster = torch.bucketize(ranks, self._cuts, right=True)
        return torch.where(cluster > 0, self.edges[1] + cluster - 1, ranks), cluster

    def _places(self, wanted: Tensor, number: int) -> Tensor:
        """Where `wanted` (N,) holds, in order: as many as there is room for, filled up with N."""
        if self.shares is None:
            return wanted.nonzero()[:, 0]
        room = int(self.shares[number] * len(wanted))
        slot = (wanted.cumsum(0) - 1).clamp(max=room).where(wanted, room)
        places = torch.full((room + 1,), len(wanted), device=wanted.device)
        places.scatter_(0, slot, torch.arange(len(wanted), device=wanted.device))
        return places[:room]

    def _scores(self, x: Tensor, targets: Tensor, pointed: Pointed | None) -> TokenScores:
        """Exact, whatever room training has."""
        size = max(1, self.chunk // len(x)) if self.chunk else x.shape[1]
        scores = []
        for start in range(0, x.shape[1], size):
            rows = slice(start, start + size)
            there = None if pointed is None else pointed.rows(rows)
            part = x[:, rows].contiguous()  # or a product copies the weights
            scores.append(self._scores_at_once(part, targets[:, rows], there))
        return TokenScores(*(torch.cat(values, dim=1) for values in zip(*scores, strict=True)))

    def _scores_at_once(self, x: Tensor, targets: Tensor, pointed: Pointed | None) -> TokenScores:
        """The logits are written over: first by exponentials, then by probabilities."""
        ranks = self._ranks(targets).view_as(targets)
        clusters = list(itertools.pairwise(self.edges))
        z = self._all().logits(x).float()
        wanted = z.gather(-1, ranks.clamp(min=0)[..., None])
        rare = z[..., self.vocab_size :].clone()  # (B, T, K)
        tops, totals = zip(
            *(exponentials_(z[..., low:high]) for low, high in clusters), strict=True
        )
        total = torch.logaddexp(totals[0], rare.logsumexp(-1, keepdim=True))
        # What is to be added to a logit of each cluster for its log-probability: (B, T, 1 + K).
        more = torch.cat([-total, rare - total], -1) - torch.cat([0 * total, *totals[1:]], -1)
        losses = -(wanted + more.gather(-1, self._choices(ranks)[1][..., None]))[..., 0]
        share = 0.0 if pointed is None else pointed.share()[..., None]
        for number, (low, high) in enumerate(clusters):
            z[..., low:high] *= (tops[number] + more[..., number, None] + share).exp()
        if pointed is not None:
            pointed.add_to(z, self.rank)
            losses = pointed.losses(losses, targets)
        # Not by `argmax`, which on a CPU takes as long as the products.
        hit = z.gather(-1, ranks.clamp(min=0)[..., None]) == z[..., : self.vocab_size].amax(
            -1, True
        )
        counted = targets >= 0
        return TokenScores(losses.where(counted, 0.0), hit[..., 0] & counted)
