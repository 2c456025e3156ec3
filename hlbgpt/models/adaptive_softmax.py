"""Adaptive softmax (Grave et al., arXiv 1609.04309): an LM head that saves time on rare tokens.

Tokens are ranked by their frequency in the training split and divided into clusters. The first
cluster holds the most frequent tokens and one class for each rare cluster. The probability of a
rare token is that of its cluster times that within the cluster. So all tokens have one properly
normalised distribution, but training computes a rare cluster only for the targets in it. Unlike in
the paper, rare clusters keep the full width.

Shapes: B sequences, T tokens, N = B x T, D width, V vocabulary, C tokens in the first cluster, K
rare clusters.
"""

import itertools
import math

import torch
from torch import Tensor, nn

from hlbgpt.models.lm_head import EVAL_CHUNK_TOKENS, IGNORE_INDEX, LMHead, TokenScores, mean_loss
from hlbgpt.models.pointer import PointerScores


class AdaptiveSoftmax(nn.Module):
    """LM head whose vocabulary is divided into 1 + K clusters; `FastGPT` explains its arguments.

    With a `capacity`, all shapes in training are static. Targets in excess of it are missing from
    the loss within the cluster, but not from that of the first cluster. Evaluation is exact.
    """

    rank: Tensor
    log_prior: Tensor
    _cutoffs: Tensor

    def __init__(
        self,
        width: int,
        vocab_size: int,
        *,
        cutoffs: tuple[int, ...] = (),
        capacity: tuple[float, ...] | None = None,
        softcap: float = 0.0,
        chunk_tokens: int = 0,
        unigram_bias: bool = True,
    ) -> None:
        super().__init__()
        edges = (*cutoffs, vocab_size)
        if any(low >= high for low, high in itertools.pairwise((0, *edges))):
            raise ValueError(
                f"model.net.cutoffs: {list(cutoffs)} do not increase from 1 to below vocab_size "
                f"{vocab_size}; change them"
            )
        if capacity is not None and len(capacity) != len(cutoffs):
            raise ValueError(
                f"model.net.capacity: {len(capacity)} values for {len(cutoffs)} cutoffs; "
                "give one for each"
            )
        if capacity is not None and not all(0 < fraction <= 1 for fraction in capacity):
            raise ValueError(
                f"model.net.capacity: {list(capacity)} are not all above 0 and at most 1"
            )
        self.vocab_size, self.capacity = vocab_size, capacity
        self.softcap, self.chunk_tokens, self.unigram_bias = softcap, chunk_tokens, unigram_bias
        self.num_common = edges[0]  # C
        self.rare_ranks = list(itertools.pairwise(edges))  # first and last + 1
        # C common tokens, K rare clusters, V - C rare tokens; tokens in the order of their rank.
        num_rare = len(cutoffs)
        self.first = slice(0, self.num_common + num_rare)
        self.rare = [slice(low + num_rare, high + num_rare) for low, high in self.rare_ranks]
        self.weight = nn.Parameter(torch.zeros(vocab_size + num_rare, width))
        self.register_buffer("log_prior", torch.zeros(vocab_size + num_rare))
        self.register_buffer("rank", torch.arange(vocab_size))  # of each token
        self.register_buffer("_cutoffs", torch.tensor(cutoffs, dtype=torch.int64), persistent=False)

    def init_from_token_counts(self, counts: Tensor) -> None:
        """Rank the tokens by `counts` (at most V,) before training."""
        # On the CPU, because not every device supports double precision.
        known = torch.zeros(self.vocab_size, dtype=torch.float64, device="cpu")
        known[: len(counts)] = counts.cpu()
        order = known.argsort(descending=True, stable=True)
        self.rank.copy_(order.argsort())
        prior = ((known[order] + 0.5) / (known + 0.5).sum()).log()  # smoothed for unseen tokens
        clusters = [prior[low:high].logsumexp(0, keepdim=True) for low, high in self.rare_ranks]
        parts = [prior[: self.num_common], *clusters, prior[self.num_common :]]
        self.log_prior.copy_(torch.cat(parts).float())

    def expected_capacity(self) -> tuple[float, ...]:
        """For each rare cluster the fraction of targets that a training step computes.

        This is `capacity`, or without it the cluster's probability in the training split. Before
        `init_from_token_counts`, Zipf's law estimates the latter. Synchronizes with the device.
        """
        if self.capacity is not None:
            return self.capacity
        if not self.log_prior.is_meta and self.log_prior.any():
            return tuple(self.log_prior[self.first][self.num_common :].exp().tolist())
        harmonic_number = math.log(self.vocab_size) + 0.5772
        return tuple(math.log(high / low) / harmonic_number for low, high in self.rare_ranks)

    def flops_per_token(self) -> float:
        """As `Network.flops_per_token`, with the expected capacity of the rare clusters."""
        sizes = (high - low for low, high in self.rare_ranks)
        rare = sum(f * size for f, size in zip(self.expected_capacity(), sizes, strict=True))
        return 6.0 * self.weight.shape[1] * (self.first.stop + rare)

    def forward(
        self,
        x: Tensor,
        targets: Tensor,
        pointer: PointerScores | None = None,
        *,
        per_token: bool = False,
    ) -> Tensor | TokenScores:
        """As `hlbgpt.models.score`, of features `x` (B, T, D) and `targets` (B, T).

        With a `pointer`, of its mixture with the vocabulary's distribution.
        """
        if per_token:
            return self._token_scores(x, targets, pointer)
        losses = self._losses(x, targets)
        if pointer is not None:
            losses = pointer.mix_losses(losses, targets).where(targets >= 0, 0.0)
        return mean_loss(losses, targets)

    def log_probs(self, x: Tensor, pointer: PointerScores | None = None) -> Tensor:
        """Log-probabilities (B, T, V), float32, of features `x` (B, T, D)."""
        log_probs = self._log_probs_by_rank(x)[..., self.rank]
        return log_probs if pointer is None else pointer.mix_log_probs(log_probs)

    def _log_probs_by_rank(self, x: Tensor) -> Tensor:
        logits = self._head().logits(x).float()  # (B, T, V + K)
        first = logits[..., self.first].log_softmax(-1)  # (B, T, C + K)
        common, clusters = first.split([self.num_common, len(self.rare)], dim=-1)
        rare = (
            logits[..., rows].log_softmax(-1) + clusters[..., number, None]
            for number, rows in enumerate(self.rare)
        )
        return torch.cat([common, *rare], dim=-1)

    def _head(self, rows: slice | None = None) -> LMHead:
        weight: Tensor = self.weight
        bias = self.log_prior if self.unigram_bias else None
        if rows is not None:  # autocast would cast even a full slice at each use
            weight, bias = weight[rows], None if bias is None else bias[rows]
        # With as many logits at a time as `chunk_tokens` tokens have over the whole vocabulary.
        chunk = self.chunk_tokens and max(1, self.chunk_tokens * self.vocab_size // len(weight))
        return LMHead(weight, bias, self.softcap, chunk)

    def _losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Training losses (B, T) in nats, float32; 0 where the target is -1."""
        flat, ranks = x.flatten(0, 1), self._ranks(targets).flatten()
        cluster = torch.bucketize(ranks, self._cutoffs, right=True)  # 0 for common tokens
        first = torch.where(cluster > 0, self.num_common + cluster - 1, ranks)
        losses = self._head(self.first).losses(flat, first)
        for number, (low, _) in enumerate(self.rare_ranks):
            index = self._select(cluster == number + 1, number)
            valid = index < len(flat)  # False for unused capacity
            index = index.clamp(max=len(flat) - 1)
            wanted = torch.where(valid, ranks[index] - low, IGNORE_INDEX)
            within = self._head(self.rare[number]).losses(flat.index_select(0, index), wanted)
            losses = losses.index_add(0, index, within)
        return losses.view_as(targets)

    def _ranks(self, targets: Tensor) -> Tensor:
        """Ranks of `targets`, in which -1 stays -1."""
        return torch.where(targets >= 0, self.rank[targets.clamp(min=0)], IGNORE_INDEX)

    def _select(self, wanted: Tensor, number: int) -> Tensor:
        """Indices where `wanted` (N,) is True, cut or padded with N to the cluster's capacity."""
        if self.capacity is None:
            return wanted.nonzero()[:, 0]
        size = int(self.capacity[number] * len(wanted))
        slot = (wanted.cumsum(0) - 1).clamp(max=size).where(wanted, size)
        index = torch.full((size + 1,), len(wanted), device=wanted.device)
        index.scatter_(0, slot, torch.arange(len(wanted), device=wanted.device))
        return index[:size]

    def _token_scores(
        self, x: Tensor, targets: Tensor, pointer: PointerScores | None
    ) -> TokenScores:
        """Exact scores, one chunk of tokens at a time."""
        size = max(1, (self.chunk_tokens or EVAL_CHUNK_TOKENS) // len(x))
        scores = []
        for start in range(0, x.shape[1], size):
            part, ranks = slice(start, start + size), self._ranks(targets[:, start : start + size])
            # Contiguous, because the product would copy the weights otherwise.
            log_probs = self._log_probs_by_rank(x[:, part].contiguous())
            index = ranks.clamp(min=0)[..., None]
            losses = -log_probs.gather(-1, index)[..., 0]
            if pointer is not None:
                mixture = pointer.select(part)
                losses = mixture.mix_losses(losses, targets[:, part])
                log_probs = mixture.mix_log_probs(log_probs, self.rank[pointer.tokens])
            # Compared with the maximum, because argmax is slow on a CPU.
            correct = log_probs.gather(-1, index)[..., 0] == log_probs.amax(-1)
            scores.append((losses.where(ranks >= 0, 0.0), correct & (ranks >= 0)))
        losses, correct = (torch.cat(parts, dim=1) for parts in zip(*scores, strict=True))
        return TokenScores(losses, correct)
