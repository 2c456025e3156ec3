"""Adaptive softmax (Grave et al., arXiv 1609.04309): an LM head that saves time on rare tokens.

Tokens are ranked by their frequency in the training split and divided into clusters. The first
cluster holds the most frequent tokens and one class for each rare cluster. The probability of a
rare token is that of its cluster times that within the cluster. So all tokens have one properly
normalised distribution, but training computes a rare cluster only for the targets in it. Unlike in
the paper, rare clusters keep the full width, and logits have a bias, the log-probability of their
token in the training split. Optionally, tokens that are spelled alike share weights, which are
added to their own; see `subwords.py`.

Shapes: B sequences, T tokens, N = B x T, D width, V vocabulary, C tokens in the first cluster, K
rare clusters, F features of a spelling.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlbgpt.models.base import require
from hlbgpt.models.kv_cache import KVCache
from hlbgpt.models.lm_head import EVAL_CHUNK_TOKENS, IGNORE_INDEX, LMHead, TokenScores, mean_loss
from hlbgpt.models.ngrams import NgramScores
from hlbgpt.models.pointer import PointerScores
from hlbgpt.models.subwords import NUM_FEATURES, SubwordEmbedding


class AdaptiveSoftmax(nn.Module):
    """LM head whose vocabulary is divided into 1 + K clusters; `FastGPT` explains its arguments.

    With a `capacity`, all shapes in training are static. Targets in excess of it are missing from
    the loss within the cluster, but not from that of the first cluster. Evaluation is exact.
    """

    rank: Tensor
    log_prior: Tensor
    features: Tensor
    vocab_loss_weight: Tensor
    _cutoffs: Tensor

    def __init__(
        self,
        width: int,
        vocab_size: int,
        cutoffs: Sequence[int] = (),
        capacity: Sequence[float] | None = None,
        *,
        subword_buckets: int = 0,
        softcap: float = 0.0,
        chunk_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.edges = [*cutoffs, vocab_size]
        require(
            all(low < high for low, high in itertools.pairwise([0, *self.edges])),
            f"cutoffs: {list(cutoffs)} do not increase from 1 to below vocab_size {vocab_size}; "
            "change them",
        )
        require(
            capacity is None or [0 < part <= 1 for part in capacity] == [True] * len(cutoffs),
            f"capacity: {list(capacity or ())} is not a fraction above 0 and at most 1 for each of "
            f"{len(cutoffs)} cutoffs; change it",
        )
        self.vocab_size, self.capacity = vocab_size, capacity
        self.softcap, self.chunk_tokens = softcap, chunk_tokens
        # Classes: C common tokens, K rare clusters, V - C rare tokens; tokens in order of rank.
        self.sizes = [high - low for low, high in itertools.pairwise([-len(cutoffs), *self.edges])]
        self.weight = nn.Parameter(torch.zeros(sum(self.sizes), width))
        self.subword_embedding = None
        if subword_buckets:
            self.subword_embedding = SubwordEmbedding(subword_buckets, width, std=0.0)
            features = torch.zeros(sum(self.sizes), NUM_FEATURES, dtype=torch.int64)
            self.register_buffer("features", features)  # of each class
        self.register_buffer("log_prior", torch.zeros(sum(self.sizes)))
        self.register_buffer("rank", torch.arange(vocab_size))  # of each token
        self.register_buffer("vocab_loss_weight", torch.zeros(()), persistent=False)
        self.register_buffer("_cutoffs", torch.tensor(cutoffs, dtype=torch.int64), persistent=False)

    def init_from_spelling(self, features: Tensor) -> None:
        """Set the `features` of tokens (at most V, F) before training."""
        self.features[self._token_class()[: len(features)]] = features.to(self.features.device)

    def _token_class(self) -> Tensor:
        """The class of each token (V,), which is not in the first cluster for rare tokens."""
        common = self.edges[0]
        return torch.where(self.rank < common, self.rank, self.rank + self.sizes[0] - common)

    def init_from_token_counts(self, counts: Tensor) -> None:
        """Rank the tokens by `counts` (at most V,) before training."""
        features = None if self.subword_embedding is None else self.features[self._token_class()]
        # On the CPU, because not every device supports double precision.
        known = torch.zeros(self.vocab_size, dtype=torch.float64, device="cpu")
        known[: len(counts)] = counts.cpu()
        order = known.argsort(descending=True, stable=True)
        self.rank.copy_(order.argsort())
        if features is not None:
            self.init_from_spelling(features)
        prior = ((known[order] + 0.5) / (known + 0.5).sum()).log()  # smoothed for unseen tokens
        common, *rare = prior.split([self.edges[0], *self.sizes[1:]])
        clusters = [tokens.logsumexp(0, keepdim=True) for tokens in rare]
        self.log_prior.copy_(torch.cat([common, *clusters, *rare]).float())

    def expected_capacity(self) -> Sequence[float]:
        """For each rare cluster the fraction of targets that a training step computes.

        Without a `capacity` this is the cluster's probability in the training split, or before
        `init_from_token_counts` that of Zipf's law. Synchronizes with the device.
        """
        if self.capacity is not None:
            return self.capacity
        if not self.log_prior.is_meta and self.log_prior.any():
            return self.log_prior[self.edges[0] : self.sizes[0]].exp().tolist()
        harmonic_number = math.log(self.vocab_size) + 0.5772
        return [math.log(b / a) / harmonic_number for a, b in itertools.pairwise(self.edges)]

    def flops_per_token(self) -> float:
        """As `Network.flops_per_token`, with the expected capacity of the rare clusters."""
        fractions = (1.0, *self.expected_capacity())
        classes = sum(f * size for f, size in zip(fractions, self.sizes, strict=True))
        return 6.0 * self.weight.shape[1] * classes

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None,
        pointer: PointerScores | None = None,
        ngrams: NgramScores | None = None,
        *,
        per_token: bool = False,
        kv_cache: KVCache | None = None,
    ) -> Tensor | TokenScores:
        """What `Network.forward` returns, of features (B, T, D); logits are log-probabilities.

        With a `pointer`, of its mixture with the vocabulary's distribution, and with `ngrams` of
        the mixture of both with them.
        """
        if targets is None:
            return self._log_probs(x, pointer, ngrams, kv_cache)
        if per_token:
            return self._token_scores(x, targets, pointer, ngrams)
        losses = vocab_losses = self._losses(x, targets)
        if pointer is not None:
            losses = pointer.mix_losses(vocab_losses - pointer.vocab, targets)
        if ngrams is not None:
            losses = ngrams.mix_losses(losses, targets, leave_out=True)
        loss = mean_loss(losses.where(targets >= 0, 0.0), targets)
        if pointer is None:
            return loss
        vocab_loss = mean_loss(vocab_losses, targets)
        # Only the second loss's gradient counts: what is returned is the loss of the predictions.
        return loss + self.vocab_loss_weight * (vocab_loss - vocab_loss.detach())

    def _log_probs(
        self,
        x: Tensor,
        pointer: PointerScores | None,
        ngrams: NgramScores | None,
        kv_cache: KVCache | None,
    ) -> Tensor:
        if kv_cache is None or self.subword_embedding is None:  # autocast keeps its casts itself
            weights = self._weights()
        else:
            weights = kv_cache.weights(self, lambda: self._weights().to(x.dtype))
        log_probs = self._log_probs_by_rank(x, pointer, weights)[..., self.rank]
        if pointer is None and ngrams is None:
            return log_probs
        mixture = (
            log_probs.exp() if pointer is None else pointer.mix_probs(log_probs, pointer.tokens)
        )
        if ngrams is not None:
            mixture = ngrams.mix_probs(mixture)
        return mixture.clamp(min=torch.finfo(mixture.dtype).tiny).log()

    def token_weights(self, tokens: Tensor) -> Tensor:
        """Weights (..., D) with which the vocabulary predicts each of `tokens` (...)."""
        classes = self._token_class()[tokens]
        weights = F.embedding(classes, self.weight)
        if self.subword_embedding is None:
            return weights
        return weights + self.subword_embedding(self.features[classes])

    def _weights(self) -> Tensor:
        """Weights (V + K, D) of all classes."""
        if self.subword_embedding is None:
            return self.weight
        return self.weight + self.subword_embedding(self.features)

    def _log_probs_by_rank(
        self, x: Tensor, pointer: PointerScores | None, weights: Tensor
    ) -> Tensor:
        """Log-probabilities (B, T, V) in order of rank, float32; without the pointer's copies."""
        # With all weights, because autocast casts parts of them again at each use.
        logits = LMHead(weights, self.log_prior, self.softcap).logits(x)  # (B, T, V + K)
        first, *rare = (part.log_softmax(-1) for part in logits.split(self.sizes, dim=-1))
        if pointer is not None:
            first = first + pointer.vocab[..., None]  # so that the vocabulary has its share
        common, *clusters = first.split([self.edges[0], *(1 for _ in rare)], dim=-1)
        sums = (within + cluster for within, cluster in zip(rare, clusters, strict=True))
        return torch.cat([common, *sums], dim=-1)

    def _losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Training losses (B, T) in nats, float32; 0 where the target is -1."""
        flat, ranks = x.flatten(0, 1), self._ranks(targets).flatten()
        cluster = torch.bucketize(ranks, self._cutoffs, right=True)  # 0 for common tokens
        first, *rare = self._heads()
        losses = first.losses(flat, torch.where(cluster > 0, self.edges[0] + cluster - 1, ranks))
        for number, (head, cutoff) in enumerate(zip(rare, self.edges, strict=False)):
            index, slot = self._select(cluster == number + 1, number)
            valid = index < len(flat)  # False for unused capacity
            wanted = torch.where(valid, take(ranks, index) - cutoff, IGNORE_INDEX)
            within = head.losses(_TakeRows.apply(flat, index, slot), wanted)
            losses = losses + _TakeRows.apply(within, slot, index)
        return losses.view_as(targets)

    def _heads(self) -> list[LMHead]:
        """The classifier of each cluster, with as many logits in a chunk as for the vocabulary."""
        logits = self.chunk_tokens * self.vocab_size
        parts = zip(
            self._weights().split(self.sizes), self.log_prior.split(self.sizes), strict=True
        )
        return [LMHead(w, b, self.softcap, logits and max(1, logits // len(w))) for w, b in parts]

    def _ranks(self, targets: Tensor) -> Tensor:
        """Ranks of `targets`, in which -1 stays -1."""
        return torch.where(targets >= 0, self.rank[targets.clamp(min=0)], IGNORE_INDEX)

    def _select(self, wanted: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Choose the tokens where `wanted` (N,) is True, up to the cluster's capacity S.

        Returns the index of the token in each slot (S,), N where a slot is empty, and the slot of
        each token (N,), S where it has none.
        """
        tokens = torch.arange(len(wanted), device=wanted.device)
        capacity = None if self.capacity is None else self.capacity[number]
        size = int(wanted.sum()) if capacity is None else int(capacity * len(wanted))
        slot = (wanted.cumsum(0) - 1).clamp(max=size).where(wanted, size)
        index = torch.full((size + 1,), len(wanted), device=wanted.device)
        return index.scatter(0, slot, tokens)[:size], slot

    def _token_scores(
        self,
        x: Tensor,
        targets: Tensor,
        pointer: PointerScores | None,
        ngrams: NgramScores | None,
    ) -> TokenScores:
        """Exact scores, one chunk of tokens at a time."""
        size = max(1, (self.chunk_tokens or EVAL_CHUNK_TOKENS) // len(x))
        scores, weights = [], self._weights()
        for start in range(0, x.shape[1], size):
            part = slice(start, start + size)
            part_pointer = pointer and pointer.select(part)
            # Contiguous, because the product would copy the weights otherwise.
            probs = self._log_probs_by_rank(x[:, part].contiguous(), part_pointer, weights)
            index = self._ranks(targets[:, part]).clamp(min=0)[..., None]
            losses = -probs.gather(-1, index)[..., 0]
            if part_pointer is not None:
                losses = part_pointer.mix_losses(losses, targets[:, part])
                probs = part_pointer.mix_probs(probs, self.rank[part_pointer.tokens])
            if ngrams is not None:
                part_ngrams = ngrams.select(part)
                losses = part_ngrams.mix_losses(losses, targets[:, part])
                probs = part_ngrams.mix_probs(probs if pointer else probs.exp(), self.rank)
            # Compared with the maximum, because argmax is slow on a CPU.
            scores.append((losses, probs.gather(-1, index)[..., 0] == probs.amax(-1)))
        losses, correct = (torch.cat(parts, dim=1) for parts in zip(*scores, strict=True))
        return TokenScores(losses.where(targets >= 0, 0.0), correct & (targets >= 0))


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows (S, ...) of `x` (N, ...) at `index` (S,), zeros where it is N."""
    if len(x) == 0:
        return x.new_zeros(len(index), *x.shape[1:])
    valid = (index < len(x)).view(-1, *[1] * (x.ndim - 1))
    return x[index.clamp(max=len(x) - 1)].where(valid, 0)


class _TakeRows(torch.autograd.Function):
    """`take` of rows that are taken at most once.

    So its gradient can be taken as well, by the inverse of the index (N,), which holds S for rows
    that are not taken. Adding gradients up row by row would sort the index on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return take(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return take(grad, *ctx.saved_tensors), None, None
