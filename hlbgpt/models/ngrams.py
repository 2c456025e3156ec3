"""Counts of n-grams of the training text, mixed into a network's predictions: the open track.

A network that has seen a few million tokens knows little of the rest of the training text. Counting
all of it takes little time, and tells what usually follows the last one to four tokens. The counts
are interpolated with absolute discounting (Ney, Essen and Kneser 1994): each n-gram's count is
lowered by a constant, and the probability that this frees goes to the next shorter context, at last
to the counts of single tokens. N-grams that occur once are left out. A learned gate mixes the
result with the network's distribution, for each prediction anew.

In training each prediction leaves its own occurrence out of the counts, so that the gate sees what
the counts say about a text that was not counted.

A context is known by a hash of 46 bits. Of ten million contexts about one pair has equal hashes; it
shares its counts, which leaves all probabilities properly normalised.

Shapes: B sequences, T tokens, D width, V vocabulary, R rows, O = `order` - 1 lengths of contexts.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlbgpt.models.base import TextChunks, require
from hlbgpt.models.kv_cache import KVCache, earlier

DISCOUNT = 0.75
_TOKEN_BITS = 17  # of a key; the other 46 are the hash of the context
_TOKEN_MASK = (1 << _TOKEN_BITS) - 1
_HASH_BITS = 63 - _TOKEN_BITS
_UNUSED = torch.iinfo(torch.int64).max  # the key of a row without an n-gram
_MOST_SORTED = 1 << 27  # n-grams that are sorted at a time; more are counted in several passes


class NgramMixture(nn.Module):
    """Counted n-grams and the gate that mixes them in.

    Args:
        vocab_size: V, at most 131,072.
        width: D, of the features that the gate reads.
        order: Longest n-gram, 2 or more.
        rows: R, the most n-grams of each length that are kept; the rarest are left out first.
    """

    keys: Tensor
    counts: Tensor
    totals: Tensor
    kept: Tensor
    prior: Tensor
    counted_tokens: Tensor

    def __init__(self, vocab_size: int, width: int, order: int, rows: int) -> None:
        super().__init__()
        require(order >= 2, f"ngram_order: {order} is neither 0 nor 2 or more; change it")
        require(rows >= 1, f"ngram_rows: {rows} is less than 1; set it to at least 1")
        require(
            vocab_size <= _TOKEN_MASK + 1,
            f"ngram_order: n-grams of {vocab_size} tokens do not fit their keys, which hold "
            f"{_TOKEN_MASK + 1}; set it to 0",
        )
        self.order = order
        # Sorted by context, and by token within it. Each row repeats what belongs to its context.
        shape = (order - 1, rows)
        self.register_buffer("keys", torch.full(shape, _UNUSED))
        self.register_buffer("counts", torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("totals", torch.ones(shape, dtype=torch.int32))  # of a context
        self.register_buffer("kept", torch.zeros(shape))  # discounted counts of a context's rows
        self.register_buffer("prior", torch.full((vocab_size,), 1 / vocab_size))
        self.register_buffer("counted_tokens", torch.tensor(0))
        self.gate = nn.Linear(width, 1, bias=False)
        self.gate_bias = nn.Parameter(torch.tensor([-2.0]))
        self.gate_counts = nn.Parameter(torch.zeros(2 * (order - 1)))
        nn.init.zeros_(self.gate.weight)

    def count(self, chunks: TextChunks) -> None:
        """Count the training text, which has at least `order` tokens."""
        vocab_size = len(self.prior)
        singles = sum(torch.bincount(chunk, minlength=vocab_size) for chunk in chunks(0))
        assert isinstance(singles, Tensor)
        known = singles.cpu().double() + 0.5  # for tokens that do not occur
        self.prior.copy_(known / known.sum())
        self.counted_tokens.copy_(singles.sum())
        passes = -(-int(self.counted_tokens) // _MOST_SORTED)
        for number in range(self.order - 1):
            parts = [
                _repeated(self._keys_of(chunks, number + 1, part, passes)) for part in range(passes)
            ]
            self._fill(number, *map(torch.cat, zip(*parts, strict=True)))

    def _keys_of(self, chunks: TextChunks, length: int, part: int, passes: int) -> Tensor:
        """Keys of all n-grams with contexts of a length whose hashes are in a part of the range."""
        found = []
        for chunk in chunks(length):
            before = [chunk[length - back : len(chunk) - back] + 1 for back in range(1, length + 1)]
            context = _hash(before)
            keys = context << _TOKEN_BITS | chunk[length:]
            found.append(keys[(context * passes) >> _HASH_BITS == part] if passes > 1 else keys)
        return torch.cat(found)

    def _fill(self, number: int, keys: Tensor, counts: Tensor, totals: Tensor) -> None:
        """Keep the most frequent n-grams of a length that fit into the table."""
        rows, least = self.keys.shape[1], 2
        while (chosen := counts >= least).sum() > rows:
            least += 1
        keys, counts, totals = (x[chosen] for x in (keys, counts, totals))
        _, context, types = torch.unique_consecutive(
            keys >> _TOKEN_BITS, return_inverse=True, return_counts=True
        )
        kept = torch.zeros_like(types).index_add_(0, context, counts) - DISCOUNT * types
        self.keys[number] = _UNUSED  # also where an earlier text had more
        columns = (self.keys, keys), (self.counts, counts), (self.totals, totals)
        for table, values in (*columns, (self.kept, kept[context])):
            table[number, : len(values)] = values.to(table)

    def forward(self, x: Tensor, tokens: Tensor, kv_cache: KVCache | None = None) -> "NgramScores":
        """What follows each of `tokens` (B, T) by the counts, and by features (B, T, D)."""
        # Counted from 1, so that 0 is what comes before the first token.
        before = [tokens + 1, *earlier(tokens + 1, self.order - 2, kv_cache, self)]
        contexts = [_hash(before[:length]) for length in range(1, self.order)]
        return NgramScores(self, torch.stack(contexts, dim=-1), self.gate(x)[..., 0].float())


class NgramScores:
    """Distributions of n-grams, for predictions (B, T), and how much each of them counts.

    Args:
        model: Has the counts.
        contexts: (B, T, O) int64, hashes.
        gate: (B, T), the part of the gate that depends on the network's features.
    """

    def __init__(self, model: NgramMixture, contexts: Tensor, gate: Tensor) -> None:
        self.model, self.contexts, self.gate = model, contexts, gate

    def select(self, positions: slice) -> "NgramScores":
        """The scores at some of the T positions."""
        return NgramScores(self.model, self.contexts[:, positions], self.gate[:, positions])

    def mix_losses(self, losses: Tensor, targets: Tensor, *, leave_out: bool = False) -> Tensor:
        """Losses (B, T) in nats of the mixture, from the network's.

        Args:
            losses: (B, T), the network's.
            targets: (B, T); where they are -1, the result is meaningless.
            leave_out: Whether the targets were counted, and have to be left out of the counts.
        """
        model, wanted = self.model, targets.clamp(min=0)
        probs, states = model.prior[wanted], []
        for number in range(model.order - 1):
            context, keys = self.contexts[..., number], model.keys[number]
            key = context << _TOKEN_BITS | wanted
            place = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
            same = keys[place] >> _TOKEN_BITS == context
            row = torch.where(same, place, (place - 1).clamp(min=0))  # one of the context, if any
            known = keys[row] >> _TOKEN_BITS == context
            count = torch.where(keys[place] == key, model.counts[number, place], 0)
            total, kept = model.totals[number, row], model.kept[number, row]
            if leave_out:
                kept = kept - _discounted(count) + _discounted(count - 1)
                count, total = count - 1, total - 1
            known, total = known & (kept > 0), total.clamp(min=1)
            # Not negative either where a target that was not counted is left out.
            rest = torch.where(known, (1 - kept / total).clamp(min=0), 1.0)
            probs = torch.where(known, _discounted(count) / total, 0.0) + rest * probs
            states += _state(known, total, rest)
        log_share, log_rest = self._log_shares(states)
        return -torch.logaddexp(log_rest - losses, log_share + probs.log())

    @torch.compiler.disable  # its shapes depend on the text
    def mix_probs(self, probs: Tensor, place: Tensor | None = None) -> Tensor:
        """Probabilities (B, T, V) of the mixture, from the network's.

        `place` (V,) is the place of each token in V, by default the token itself.
        """
        model, shape = self.model, self.gate.shape
        queries = self.contexts.flatten(0, 1)  # (N, O)
        every = torch.arange(len(queries), device=queries.device)
        rest = torch.ones(len(queries), device=probs.device)  # what is left for shorter contexts
        states: list[Tensor] = []
        found: list[tuple[Tensor, Tensor, Tensor]] = []  # number of the prediction, token, share
        for number in reversed(range(model.order - 1)):
            keys, first = model.keys[number], queries[:, number].contiguous() << _TOKEN_BITS
            start, stop = (torch.searchsorted(keys, first + end) for end in (0, _TOKEN_MASK + 1))
            row, size = start.clamp(max=len(keys) - 1), stop - start
            total, kept = model.totals[number, row], model.kept[number, row]
            index = every.repeat_interleave(size)
            rows = torch.arange(len(index), device=keys.device)
            rows = rows + (start - size.cumsum(0) + size)[index]
            share = _discounted(model.counts[number, rows]) * (rest / total)[index]
            found.append((index, keys[rows] & _TOKEN_MASK, share))
            lower = torch.where(size > 0, 1 - kept / total, 1.0)
            states = [*_state(size > 0, total, lower), *states]
            rest = rest * lower
        log_share, log_rest = self._log_shares([state.view(shape) for state in states])
        index, tokens, shares = map(torch.cat, zip(*found, strict=True))
        prior = model.prior
        if place is not None:
            tokens, prior = place[tokens], torch.empty_like(prior).index_copy_(0, place, prior)
        share = log_share.exp().flatten()
        mixture = probs * log_rest.exp()[..., None] + (share * rest).view(*shape, 1) * prior
        places = index * len(prior) + tokens
        return mixture.flatten().index_add(0, places, shares * share[index]).view_as(probs)

    def _log_shares(self, states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logarithms of the shares of the n-grams and of the network, both (B, T)."""
        model = self.model
        gate = (
            self.gate
            + model.gate_bias
            + (torch.stack(list(states), dim=-1) * model.gate_counts).sum(-1)
        )
        return F.logsigmoid(gate), F.logsigmoid(-gate)


def _hash(tokens: Sequence[Tensor]) -> Tensor:
    """46 bits that depend on all `tokens`, int64 of equal shapes."""
    value = torch.zeros_like(tokens[0])
    for token in tokens:  # multiplications of int64 keep the lowest bits
        value = (value + token) * 0x1E3779B97F4A7C15
        value = value ^ (value >> 29)
    return (value * 0x3F58476D1CE4E5B9) >> (64 - _HASH_BITS) & ((1 << _HASH_BITS) - 1)


def _state(known: Tensor, total: Tensor, rest: Tensor) -> list[Tensor]:
    """What the gate reads of a context: how often it occurs, and what is left for shorter ones."""
    return [torch.where(known, total.log() / 10, 0.0), rest]


def _discounted(count: Tensor) -> Tensor:
    """Counts less the discount, 0 for those that are not kept."""
    return torch.where(count >= 2, count - DISCOUNT, 0.0)


def _repeated(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of n-grams: the keys that occur more than once, in order, how often, and their contexts."""
    keys, counts = torch.unique_consecutive(keys.sort().values, return_counts=True)
    _, context = torch.unique_consecutive(keys >> _TOKEN_BITS, return_inverse=True)
    totals = torch.zeros_like(keys).index_add_(0, context, counts)[context]
    repeated = counts >= 2
    return keys[repeated], counts[repeated], totals[repeated]
