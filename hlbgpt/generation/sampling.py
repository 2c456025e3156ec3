"""Sampling: continue prompts token by token, with a KV cache where the network supports one."""

import dataclasses
import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from hlbgpt.data.tokenizer import Tokenizer
from hlbgpt.generation.detokenizer import StreamingDetokenizer
from hlbgpt.models import KVCache, Network
from hlbgpt.utils.errors import InputError


@dataclasses.dataclass
class SamplingConfig:
    """Settings for continuing prompts, used by `predict`, by samples and from Python.

    Args:
        max_new_tokens: Maximum number of tokens to add to a prompt.
        temperature: The logits are divided by it; 0 always takes the most likely token.
        top_k: Sample from the k most likely tokens only; 0 means all tokens.
        top_p: Of those, sample from the most likely ones that together reach this probability.
        stop: A continuation ends before the first of these strings.
        stream: Whether `predict` prints a text while it is generated, one prompt after another
            instead of `data.eval_batch_size` at a time; null does so on a terminal only.
        seed: Random seed; each prompt starts from it, so its text does not depend on the others.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    stop: list[str] | str = dataclasses.field(default_factory=list)
    stream: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        for name, valid, range_ in (
            ("max_new_tokens", self.max_new_tokens >= 0, "0 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "a finite number, 0 or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1 (all tokens)"),
            ("stop", "" not in self.stop, "strings that are not empty"),
            ("seed", 0 <= self.seed < 2**64, "0 to 2^64 - 1"),
        ):
            if not valid:
                value = getattr(self, name)
                raise InputError(f"model.sampling.{name}: {value!r} is not valid; use {range_}")


def continue_prompts(
    net: Network,
    prompts: list[Tensor],
    config: SamplingConfig,
    tokenizer: Tokenizer,
    write: Callable[[str], None] | None = None,
) -> list[str]:
    """Continue prompts, each tokens (t,) int64 with t at least 1, and decode them.

    `write` is called with each text, in order and followed by an empty line; when streaming, with
    pieces of it while it is generated. Returns each prompt with its continuation.
    """
    stream = sys.stdout.isatty() if config.stream is None else config.stream
    if write is not None and stream and len(prompts) > 1:
        return [continue_prompts(net, [p], config, tokenizer, write)[0] for p in prompts]
    write_piece = write if stream else None
    detokenizers = [StreamingDetokenizer(tokenizer, config.stop, write_piece) for _ in prompts]
    for detokenizer, prompt in zip(detokenizers, prompts, strict=True):
        detokenizer.add_prompt(prompt.tolist())

    def on_token(index: int, token: int) -> bool:
        return detokenizers[index].add_token(token)

    generate(net, prompts, config, vocab_size=tokenizer.vocab_size, on_token=on_token)
    for detokenizer in detokenizers:
        detokenizer.finalize()
        if write is not None:
            write("\n\n" if stream else f"{detokenizer.text}\n\n")
    return [detokenizer.text for detokenizer in detokenizers]


@torch.no_grad()
def generate(
    net: Network,
    prompts: list[Tensor],
    config: SamplingConfig,
    *,
    vocab_size: int,
    on_token: Callable[[int, int], bool] | None = None,
    use_cache: bool = True,
) -> list[Tensor]:
    """Continue prompts by `config.max_new_tokens` tokens each.

    Args:
        net: The network.
        prompts: Tokens (t,) int64 of each prompt, of any lengths of at least 1.
        config: The settings; `stop` and `stream` are not used here.
        vocab_size: Number of the tokenizer's tokens; logits beyond it (padding) are never drawn.
        on_token: Called with the index of a prompt and its new token; False ends this prompt.
        use_cache: Whether to use a KV cache if the network supports one; the tokens are the same.

    Returns:
        The tokens (at most t + max_new_tokens,) of each prompt and its continuation.
    """
    if not prompts:
        return []
    if not all(map(len, prompts)):
        raise ValueError("prompts: one has no tokens; give each at least one token")
    device, context = prompts[0].device, net.max_sequence_length or sys.maxsize
    sequences = [_Sequence(prompt.tolist(), context, config.seed) for prompt in prompts]
    active = list(range(len(prompts)))  # indices of the prompts that are still continued
    kv_cache = None
    if use_cache and net.supports_kv_cache:
        longest = max(map(len, prompts)) + config.max_new_tokens
        kv_cache = KVCache(len(prompts), min(longest, context))
    # Under Lightning's autocast every forward pass would cast the weights again.
    autocast = torch.is_autocast_enabled(device.type)
    with torch.autocast(device.type, enabled=autocast, cache_enabled=True):
        for _ in range(config.max_new_tokens):
            windows = [sequences[index].window for index in active]
            logits = _next_token_logits(net, windows, kv_cache, device)[:, :vocab_size]
            kept = []
            for row, (index, scores) in enumerate(zip(active, logits.float().cpu(), strict=True)):
                token = sequences[index].sample(scores, config)
                if on_token is None or on_token(index, token):
                    kept.append(row)
            if kv_cache is not None and len(kept) < len(active):
                kv_cache.select(kept)
            active = [active[row] for row in kept]
            if not active:
                break
    return [torch.tensor(sequence.tokens, device=device) for sequence in sequences]


class _Sequence:
    """The tokens of a prompt and its continuation, and the window of them that the network sees.

    A window that outgrows the context loses its older half, because the rest changes position and
    must be read again. Tokens are drawn on the CPU, where a seed gives the same draws everywhere.
    """

    def __init__(self, prompt: list[int], context: int, seed: int) -> None:
        self.tokens, self.window, self._context = prompt, prompt[-context:], context
        self._rng = torch.Generator().manual_seed(seed)

    def sample(self, logits: Tensor, config: SamplingConfig) -> int:
        """Draw the next token by its logits (V,), append it and return it."""
        tokens, probabilities = top_k_top_p(logits, config)
        token = int(tokens[torch.multinomial(probabilities, 1, generator=self._rng)])
        self.tokens.append(token)
        self.window.append(token)
        if len(self.window) > self._context:
            self.window = self.window[-((self._context + 1) // 2) :]
        return token


def _next_token_logits(
    net: Network, windows: list[list[int]], kv_cache: KVCache | None, device: torch.device
) -> Tensor:
    """Logits (B, V) of the token after each window.

    `net.forward` bypasses torch.compile, which would compile anew for every length.
    """
    if kv_cache is None:
        return torch.cat([net.forward(torch.tensor([w], device=device))[:, -1] for w in windows])
    for row, window in enumerate(windows):
        if kv_cache.lengths[row] != len(window) - 1:  # a new prompt, or a window that was cut
            prefilled = KVCache(1, len(window))
            if len(window) > 1:
                net.forward(torch.tensor([window[:-1]], device=device), kv_cache=prefilled)
            kv_cache.insert(row, prefilled)
    last = torch.tensor([window[-1:] for window in windows], device=device)
    return net.forward(last, kv_cache=kv_cache)[:, -1]


def top_k_top_p(logits: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Tokens (n,) that top-k, temperature and top-p leave of logits (V,), and their probabilities.

    The probabilities are float64, and not renormalized after top-p, as `torch.multinomial` does so.
    """
    size = min(config.top_k or len(logits), len(logits))
    logits, tokens = logits.double().topk(size)  # sorted; doubles allow any temperature
    if not logits[0].isfinite():
        raise InputError(
            f"model.net: its largest logit is {logits[0].item()}, so no token can be drawn; use a "
            "checkpoint from before training diverged"
        )
    if config.temperature == 0:
        return tokens[:1], torch.ones(1, dtype=torch.float64)
    probabilities = ((logits - logits[0]) / config.temperature).softmax(-1)
    probabilities[probabilities.cumsum(-1) - probabilities >= config.top_p] = 0
    return tokens, probabilities
