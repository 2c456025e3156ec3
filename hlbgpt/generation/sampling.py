"""Continuing texts with a network."""

import codecs
import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable

import tiktoken
import torch
from torch import Tensor

from hlbgpt.models import Cache, Network
from hlbgpt.utils.errors import InputError

_KEY = "model.generation."


@dataclasses.dataclass
class Generation:
    """How `predict` and samples continue a prompt.

    Args:
        max_new_tokens: Tokens to add to the prompt, at most.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Draw from the k likeliest tokens only; 0 draws from all.
        top_p: Of those, draw from the likeliest that together reach this probability; 1 for all.
        stop: Texts before the first of which a continuation ends.
        stream: Whether `predict` prints a text while it grows, one after the other, and not
            `data.eval_batch_size` together; by default on a terminal.
        seed: Seed of the draws, the same for each prompt.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    stop: list[str] | str = dataclasses.field(default_factory=list)
    stream: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "temperature", "top_k"):
            if (value := getattr(self, name)) < 0:
                raise InputError(f"{_KEY}{name}: {value} is negative; use 0 or more")
        if not math.isfinite(self.temperature):
            raise InputError(f"{_KEY}temperature: {self.temperature} is no number; try 0.8")
        if not 0 < self.top_p <= 1:
            raise InputError(
                f"{_KEY}top_p: {self.top_p} is not above 0 and at most 1; 1 draws from all tokens"
            )
        if not 0 <= self.seed < 2**64:
            raise InputError(f"{_KEY}seed: {self.seed} is not from 0 to 2^64 - 1; change it")
        if "" in self.stops:
            raise InputError(f"{_KEY}stop: '' ends every text at once; give some text, or []")

    @property
    def stops(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def streams(self) -> bool:
        """`stream`, or what it is by default."""
        return sys.stdout.isatty() if self.stream is None else self.stream


class TextWriter:
    """Turns the tokens of one text into text, up to the first stop string of the continuation.

    The first stop string is the one that is complete first, and of those the longest. Text that
    may yet become one is held back, as are bytes that are not yet a character.

    Args:
        encoding: The tokenizer.
        stops: Stop strings, none of them empty.
        write: Called with each piece of the text, as soon as it is certain.

    Attributes:
        text: What was written so far.
        ended: Whether a stop string came.
    """

    def __init__(
        self,
        encoding: tiktoken.Encoding,
        stops: list[str],
        write: Callable[[str], None] | None = None,
    ) -> None:
        self.text, self.ended = "", False
        self._encoding, self._stops, self._write = encoding, stops, write
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def begin(self, prompt: list[int]) -> None:
        """Write the tokens of a prompt, in which no stop string is looked for."""
        self._emit(self._decoder.decode(self._encoding.decode_bytes(prompt)))

    def add(self, token: int) -> bool:
        """Take the continuation's next token; returns whether the text goes on."""
        self._take(self._decoder.decode(self._encoding.decode_single_token_bytes(token)))
        return not self.ended

    def end(self) -> None:
        """Write what was held back; no token comes any more."""
        if not self.ended:
            self._take(self._decoder.decode(b"", final=True))
        if not self.ended:
            self._emit(self._held)

    def _take(self, piece: str) -> None:
        self._held += piece
        found = [
            (start + len(stop), start)
            for stop in self._stops
            if (start := self._held.find(stop)) >= 0
        ]
        self.ended = bool(found)
        safe = min(found)[1] if found else len(self._held) - self._overlap()
        self._emit(self._held[:safe])
        self._held = self._held[safe:]

    def _overlap(self) -> int:
        """Characters at the end of what is held that may be the beginning of a stop string."""
        longest = min(len(self._held), max(map(len, self._stops), default=1) - 1)
        for size in range(longest, 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0

    def _emit(self, piece: str) -> None:
        self.text += piece
        if piece and self._write is not None:
            self._write(piece)


def continue_texts(
    net: Network,
    prompts: list[Tensor],
    how: Generation,
    encoding: tiktoken.Encoding,
    write: Callable[[str], None] | None = None,
) -> list[str]:
    """Each of `prompts`, (t,) int64 and t at least 1, and its continuation as text.

    `write`, if given, gets the texts in order, an empty line after each; if `how.streams`, piece
    by piece while they are made one after the other.
    """
    if write is not None and how.streams and len(prompts) > 1:
        return [continue_texts(net, [prompt], how, encoding, write)[0] for prompt in prompts]
    live = write if how.streams else None
    writers = [TextWriter(encoding, how.stops, live) for _ in prompts]
    for writer, prompt in zip(writers, prompts, strict=True):
        writer.begin(prompt.tolist())
    generate(
        net,
        prompts,
        how,
        vocab_size=encoding.n_vocab,
        take=lambda row, token: writers[row].add(token),
    )
    for writer in writers:
        writer.end()
        if write is not None:
            write("\n\n" if live else f"{writer.text}\n\n")
    return [writer.text for writer in writers]


class _Window:
    """The part of a growing text that fits the network's context.

    When the context is full, its older half is forgotten: what is left must be read again, for it
    has other places now, and so this comes rarely.
    """

    def __init__(self, prompt: list[int], context: int | None, seed: int) -> None:
        self.tokens, self._context = prompt, context
        self._start = max(0, len(prompt) - context) if context else 0
        self._random = torch.Generator().manual_seed(seed)

    @property
    def visible(self) -> list[int]:
        return self.tokens[self._start :]

    def add(self, tokens: Tensor, share: Tensor) -> int:
        """Draw the next token from `tokens` by their probabilities."""
        token = int(tokens[torch.multinomial(share, 1, generator=self._random)])
        self.tokens.append(token)
        if self._context and len(self.tokens) - self._start > self._context:
            self._start = len(self.tokens) - (self._context + 1) // 2
        return token


@torch.no_grad()
def generate(
    net: Network,
    prompts: list[Tensor],
    how: Generation,
    *,
    vocab_size: int,
    take: Callable[[int, int], bool] | None = None,
    use_cache: bool = True,
) -> list[Tensor]:
    """Continue each of `prompts` (t,) int64 by `how.max_new_tokens` tokens: (t + max_new_tokens,).

    Only the first `vocab_size` logits are drawn from, so padding of the vocabulary never shows.
    Past the network's context the older half of it is forgotten. The draws are made on the CPU,
    and are the same on every device and whatever other prompts there are.

    Args:
        net: The network.
        prompts: Of any lengths, each at least 1.
        how: The settings; `stop` and `stream` are not used here.
        vocab_size: Number of the tokenizer's tokens.
        take: Called with the number of a prompt and its next token; if it returns False, the
            prompt is continued no further.
        use_cache: Whether a network that can do it reads each token only once.
    """
    if not all(map(len, prompts)):
        raise ValueError("a prompt has no tokens: nothing to continue")
    context = net.max_sequence_length
    windows = [_Window(prompt.tolist(), context, how.seed) for prompt in prompts]
    rows = list(range(len(prompts)))  # of the prompts that are still continued
    cache = None
    if use_cache and net.reads_cache:
        longest = max(map(len, prompts), default=0) + how.max_new_tokens
        cache = Cache(len(prompts), min(longest, context or longest))
    with _weights_cast_once(prompts):
        for _ in range(how.max_new_tokens):
            if not rows:
                break
            visible = [windows[row].visible for row in rows]
            logits = _next_logits(net, visible, cache, prompts[0].device)[:, :vocab_size]
            left = []
            for place, (row, scores) in enumerate(zip(rows, logits.float().cpu(), strict=True)):
                token = windows[row].add(*candidates(scores, how))
                if take is None or take(row, token):
                    left.append(place)
            if len(left) < len(rows):
                rows = [rows[place] for place in left]
                if cache is not None:
                    cache.keep(left)
    return [
        torch.tensor(window.tokens, device=prompt.device)
        for window, prompt in zip(windows, prompts, strict=True)
    ]


def _weights_cast_once(prompts: list[Tensor]) -> contextlib.AbstractContextManager[object]:
    """Under autocast, keep what it makes of the weights; Lightning lets it cast at each use."""
    device = prompts[0].device.type if prompts else "cpu"
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=True)


def _next_logits(
    net: Network, texts: list[list[int]], cache: Cache | None, device: torch.device
) -> Tensor:
    """Logits (B, V) of what follows each of `texts`, of which `cache` may hold all but the end."""
    # `forward` past torch.compile: every length would compile anew.
    if cache is None:
        return torch.cat([net.forward(torch.tensor([t], device=device))[:, -1] for t in texts])
    for row, text in enumerate(texts):
        if cache.lengths[row] != len(text) - 1:  # a new text, or one of which a part is forgotten
            alone = Cache(1, len(text))
            if len(text) > 1:
                net.forward(torch.tensor([text[:-1]], device=device), cache=alone)
            cache.put(row, alone)
    last = torch.tensor([text[-1:] for text in texts], device=device)
    return net.forward(last, cache=cache)[:, -1]


def candidates(logits: Tensor, how: Generation) -> tuple[Tensor, Tensor]:
    """The tokens (n,) int64 to draw from by `logits` (V,), and their probabilities (n,) float64.

    Temperature comes first, then top-k, then top-p; the probabilities sum to the share that is
    left by top-p. Raises InputError for logits that are no numbers.
    """
    top, likeliest = logits.max(0)
    if not top.isfinite():
        raise InputError(
            f"model.net: its largest logit is {top.item()}, so nothing can be drawn; use a "
            "checkpoint from before training broke down"
        )
    if how.temperature == 0:
        return likeliest[None], torch.ones(1, dtype=torch.float64)
    tokens = torch.arange(len(logits))
    if 0 < how.top_k < len(logits) or how.top_p < 1:
        logits, tokens = logits.topk(min(how.top_k or len(logits), len(logits)))  # in order
    # As doubles, so that any temperature will do.
    share = ((logits.double() - top) / how.temperature).softmax(-1)
    if how.top_p < 1:
        share[share.cumsum(-1) - share >= how.top_p] = 0
    return tokens, share
