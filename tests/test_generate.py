"""Generation: the KV cache changes no token, sampling follows its settings, text is whole."""

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import tiktoken
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hlbgpt.data.tokenizer import Tokenizer, load_tokenizer
from hlbgpt.generation import (
    SamplingConfig,
    StreamingDetokenizer,
    continue_prompts,
    generate,
    top_k_top_p,
)
from hlbgpt.models import GPT, HLB041, FastGPT, KVCache, Network
from hlbgpt.utils.errors import InputError

SIZES: dict[str, Any] = {"vocab_size": 64, "width": 16, "num_blocks": 2}
TABLES: dict[str, Any] = {"value_embed_blocks": 1, "bigram_buckets": 31, "cutoffs": [8, 24]}
NETWORKS: dict[str, Callable[..., Network]] = {
    "gpt": lambda **sizes: GPT(num_heads=2, **sizes),
    "hlb041": HLB041,
    "fast": lambda **sizes: FastGPT(num_heads=2, **sizes),
    "fast, tables": lambda **sizes: FastGPT(num_heads=2, **TABLES, **sizes),
    "fast, spelling": lambda **sizes: FastGPT(
        num_heads=2, cutoffs=[8], subword_buckets=30, head_input=True, **sizes
    ),
    "fast, pointer": lambda **sizes: FastGPT(num_heads=2, pointer_dim=8, **sizes),
    "fast, n-grams": lambda **sizes: FastGPT(
        num_heads=2, pointer_dim=8, ngram_order=4, ngram_rows=300, **sizes
    ),
    "fast, bare": lambda **sizes: FastGPT(
        num_heads=2, token_shift=False, pointer_dim=8, pointer_ngrams=0, **sizes
    ),
}
each_network = pytest.mark.parametrize("name", NETWORKS)
ALL = {"temperature": 1.0, "top_k": 0}


def network(name: str, *, context: int = 16, **sizes: int) -> Network:
    """Random weights, because many start as zero; in double precision, to compare results."""
    torch.manual_seed(0)
    net = NETWORKS[name](**SIZES | sizes, max_sequence_length=context)
    net.init_from_token_counts(torch.randint(1000, (60,)))
    net.init_from_spelling([b" %d" % token for token in range(60)])
    net.init_from_text(lambda overlap: iter([torch.arange(60).repeat(3) // 2]))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net.double()


def prompts_of(*lengths: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(60, (length,), generator=random) for length in lengths]


def tokens_of(net: Network, prompts: list[Tensor], **settings: Any) -> list[list[int]]:
    extra = {key: settings.pop(key) for key in ("on_token", "use_cache") if key in settings}
    out = generate(net, prompts, SamplingConfig(**settings), vocab_size=60, **extra)
    return [tokens.tolist() for tokens in out]


# --- with and without a KV cache ------------------------------------------------------------------


@settings(max_examples=30)
@given(
    name=st.sampled_from(list(NETWORKS)),
    context=st.integers(1, 12),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    new=st.integers(0, 25),
    seed=st.integers(0, 9),
)
def test_the_kv_cache_changes_no_token(
    name: str, context: int, lengths: list[int], new: int, seed: int
) -> None:
    """For prompts of any lengths, also where a text is several times as long as the context."""
    net, prompts = network(name, context=context), prompts_of(*lengths)
    how = {"max_new_tokens": new, "seed": seed, **ALL}
    tokens = tokens_of(net, prompts, **how)
    assert tokens == tokens_of(net, prompts, **how, use_cache=False)
    assert [len(row) for row in tokens] == [length + new for length in lengths]


@each_network
def test_the_kv_cache_changes_no_token_in_single_precision(name: str) -> None:
    net, prompts = network(name).float(), prompts_of(1, 5, 16, 30)
    how = {"max_new_tokens": 40, **ALL}
    assert tokens_of(net, prompts, **how) == tokens_of(net, prompts, **how, use_cache=False)


@each_network
@settings(max_examples=10)
@given(cuts=st.sets(st.integers(1, 15)))
def test_chunks_give_the_logits_of_the_whole(name: str, cuts: set[int]) -> None:
    """The logits after each chunk are those of the network without a cache."""
    net = network(name)
    tokens, cache = torch.randint(60, (3, 16)), KVCache(3, 16)
    whole = net(tokens)
    ends = [0, *sorted(cuts), 16]
    for start, end in itertools.pairwise(ends):
        last = net(tokens[:, start:end], kv_cache=cache)
        assert last.shape == (3, 1, 64)
        torch.testing.assert_close(last[:, 0], whole[:, end - 1])


@each_network
def test_sequences_of_a_batch_do_not_mix(name: str) -> None:
    """Also after one is replaced and others are dropped."""
    net, texts = network(name), prompts_of(9, 3, 6)
    cache = KVCache(3, 16)
    net(torch.randint(60, (3, 7)), kv_cache=cache)
    for row, text in enumerate(texts):
        alone = KVCache(1, 16)
        net(text[None], kv_cache=alone)
        cache.insert(row, alone)
    for rows in ([0, 1, 2], [2, 0], [1]):
        cache.select(rows)
        texts = [torch.cat([texts[row], torch.randint(60, (2,))]) for row in rows]
        last = net(torch.stack([text[-2:] for text in texts]), kv_cache=cache)
        for logits, text in zip(last, texts, strict=True):
            torch.testing.assert_close(logits[-1], net(text[None])[0, -1])


def test_an_emptied_sequence_starts_anew() -> None:
    net, cache = network("fast, tables"), KVCache(1, 16)
    net(torch.tensor([[1, 2, 3]]), kv_cache=cache)
    cache.insert(0, KVCache(1, 1))
    tokens = torch.tensor([[4]])
    torch.testing.assert_close(net(tokens, kv_cache=cache), net(tokens))


def test_the_lm_head_is_spelled_once_for_a_kv_cache() -> None:
    net, cache, calls = network("fast, spelling"), KVCache(1, 16), []
    spelling = net.get_submodule("lm_head.subword_embedding")
    # Of all classes (V + K, F), unlike the features of the latest tokens (B, T, F).
    spelling.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].ndim))
    for _ in range(3):
        net(torch.tensor([[1]]), kv_cache=cache)
    assert calls.count(2) == 1


def test_a_full_kv_cache_refuses_more_tokens() -> None:
    net, cache = network("gpt"), KVCache(1, 4)
    net(torch.tensor([[1, 2, 3]]), kv_cache=cache)
    with pytest.raises(ValueError, match="at most 4 tokens: cannot take 1 of 5"):
        net(torch.tensor([[4, 5]]), kv_cache=cache)
    with pytest.raises(ValueError, match="cannot take 2"):
        net(torch.tensor([[4], [5]]), kv_cache=cache)


class Plain(Network):
    """A network without a KV cache, such as a user may write: the last token decides."""

    vocab_size = 64

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 64)

    def forward(self, tokens, targets=None, *, per_token=False):
        return self.table(tokens)


def test_a_network_without_a_kv_cache() -> None:
    net = Plain()
    expected = [7]
    for _ in range(20):
        expected.append(int(net.table.weight[expected[-1], :60].argmax()))
    prompts = [torch.tensor([7]), torch.tensor([3, 7])]
    tokens = tokens_of(net, prompts, max_new_tokens=20, temperature=0)
    assert tokens == [expected, [3, *expected]]


def test_autocast_casts_the_weights_only_once() -> None:
    """Under Lightning's autocast, which would cast them at each use."""
    net, config = network("fast, tables").float(), SamplingConfig(max_new_tokens=4)
    prompts = prompts_of(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(net, prompts, config, vocab_size=60)
    with (
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
        torch.profiler.profile(record_shapes=True) as profile,
    ):
        tokens = generate(net, prompts, config, vocab_size=60)
    assert all(map(torch.equal, tokens, expected))
    head = [list(net.lm_head.weight.shape)]
    casts = [e for e in profile.events() if e.name == "aten::copy_" and e.input_shapes[:1] == head]
    assert len(casts) == 1


# --- sampling -------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_tokens_within_the_vocabulary() -> None:
    net, prompts = network("gpt", context=8), prompts_of(3)
    (tokens,) = tokens_of(net, prompts, max_new_tokens=30, **ALL)
    assert tokens[:3] == prompts[0].tolist()
    assert max(tokens) < 60
    assert len(set(tokens)) > 3
    assert [tokens] == tokens_of(net, prompts, max_new_tokens=30, **ALL)
    assert [tokens] != tokens_of(net, prompts, max_new_tokens=30, seed=1, **ALL)


def test_a_full_context_loses_its_older_half() -> None:
    net = network("gpt", context=8)
    (tokens,) = tokens_of(net, prompts_of(11), max_new_tokens=30, temperature=0)
    seen = tokens[3:11]
    for token in tokens[11:]:
        assert net(torch.tensor([seen]))[0, -1, :60].argmax() == token
        seen.append(token)
        if len(seen) > 8:
            seen = seen[-4:]


@pytest.mark.parametrize("lengths", [(4, 1, 9, 20), (4, 4, 4, 4)])
def test_a_prompt_is_continued_the_same_in_any_batch(lengths: tuple[int, ...]) -> None:
    """Also where other prompts end earlier."""
    net, prompts = network("fast"), prompts_of(*lengths)
    how = {"max_new_tokens": 40, **ALL}
    alone = [tokens_of(net, [prompt], **how)[0] for prompt in prompts]
    assert tokens_of(net, prompts, **how) == alone
    assert tokens_of(net, prompts[::-1], **how) == alone[::-1]
    left = {0: 5, 1: 1, 2: 5, 3: 40}

    def on_token(row: int, token: int) -> bool:
        left[row] -= 1
        return left[row] > 0

    tokens = tokens_of(net, prompts, **how, on_token=on_token)
    assert left == dict.fromkeys(range(4), 0)
    assert tokens == [row[: len(row) - less] for row, less in zip(alone, (35, 39, 35, 0))]  # noqa: B905


def expected(logits: list[float], config: SamplingConfig) -> dict[int, float]:
    """Slow reference of `top_k_top_p`: probabilities of the tokens, summing to 1."""
    if config.temperature == 0:
        return {logits.index(max(logits)): 1.0}
    weight = {
        token: float(torch.tensor((value - max(logits)) / config.temperature).double().exp())
        for token, value in enumerate(logits)
    }
    order = sorted(weight, key=lambda token: -weight[token])[: config.top_k or None]
    total, reached, kept = sum(weight[token] for token in order), 0.0, []
    for token in order:
        kept.append(token)
        reached += weight[token] / total
        if reached >= config.top_p:
            break
    return {token: weight[token] / sum(weight[t] for t in kept) for token in kept}


@given(
    logits=st.lists(st.integers(-500, 500), min_size=1, max_size=30, unique=True),
    temperature=st.sampled_from([0, 1e-30, 0.1, 0.8, 1, 5]),
    top_k=st.integers(0, 40),
    top_p=st.sampled_from([1e-9, 0.1234, 0.5678, 0.9123, 1.0]),
)
def test_temperature_then_top_k_then_top_p(
    logits: list[int], temperature: float, top_k: int, top_p: float
) -> None:
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    scores = torch.tensor(logits) / 64
    tokens, share = top_k_top_p(scores, config)
    found = dict(zip(tokens.tolist(), (share / share.sum()).tolist(), strict=True))
    found = {token: value for token, value in found.items() if value > 1e-12}
    likely = {t: v for t, v in expected(scores.tolist(), config).items() if v > 1e-12}
    assert found == pytest.approx(likely, rel=1e-4)


def test_tokens_are_drawn_by_their_probabilities() -> None:
    net = Plain()
    nn.init.zeros_(net.table.weight)
    share = torch.tensor([0.5, 0.3, 0.2])
    net.table.weight.data[:, :3] = share.log() + 50
    (tokens,) = tokens_of(net, [torch.tensor([0])], max_new_tokens=1000, **ALL)
    found = torch.bincount(torch.tensor(tokens[1:])) / 1000
    torch.testing.assert_close(found, share, rtol=0, atol=0.06)


def test_empty_prompts_and_diverged_networks_are_refused() -> None:
    net = network("gpt")
    with pytest.raises(ValueError, match="prompts: one has no tokens"):
        tokens_of(net, prompts_of(3, 0))
    nn.init.constant_(net.embedding.weight, torch.nan)
    with pytest.raises(InputError, match=r"model.net: its largest logit is nan"):
        tokens_of(net, prompts_of(3))


# --- text -----------------------------------------------------------------------------------------

# Tokens that hold several characters, or end or begin within one.
PIECES = [b"ab", b"ba", b"abc", b"a\xc3", b"\xa9b", b"\xf0\x9f", b"\x99\x82", "é🙂".encode()]
RANKS = {bytes([byte]): byte for byte in range(256)} | {p: 256 + i for i, p in enumerate(PIECES)}
ENCODING = tiktoken.Encoding("pieces", pat_str=r"[\s\S]", mergeable_ranks=RANKS, special_tokens={})
TOKENIZER = Tokenizer(ENCODING, ["<|user|>", "cb🙂"])
LETTERS = st.sampled_from(["a", "b", "c", "é", "🙂", "\ufffd", "<", "|"])


def cut(text: str, stops: list[str]) -> str:
    """Slow reference: `text` before the first complete stop string, the longest of those."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return text


@settings(max_examples=300)
@given(
    tokens=st.lists(st.sampled_from([97, 98, 99, 0xC3, 0xA9, *range(256, TOKENIZER.vocab_size)])),
    stops=st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3),
)
@example(tokens=[258], stops=["abc", "b"])
def test_pieces_form_the_text_before_the_first_stop(tokens: list[int], stops: list[str]) -> None:
    pieces: list[str] = []
    detokenizer = StreamingDetokenizer(TOKENIZER, stops, pieces.append)
    prompt = list("abcé🙂".encode())
    detokenizer.add_prompt(prompt)
    for token in tokens:
        if not detokenizer.add_token(token):
            break
    detokenizer.finalize()
    uncut = TOKENIZER.decode_bytes(tokens).decode(errors="replace")
    text = cut(uncut, stops)
    assert detokenizer.text == "".join(pieces) == "abcé🙂" + text
    assert detokenizer.stopped == (text != uncut)


def test_text_is_written_as_soon_as_it_is_final() -> None:
    pieces: list[str] = []
    detokenizer = StreamingDetokenizer(load_tokenizer("bytes"), ["bad"], pieces.append)
    detokenizer.add_prompt(list(b"x"))
    for byte, written in zip("éab-bad".encode(), ("", "é", "a", "", "b-", "", "", ""), strict=True):
        before = len(pieces)
        assert detokenizer.add_token(byte) == (byte != ord("d"))
        assert "".join(pieces[before:]) == written
    assert "".join(pieces) == "xéab-"


@pytest.fixture
def speaker() -> Network:
    return network("fast", vocab_size=256, context=32)


def texts_of(net: Network, texts: list[str], **settings: Any) -> tuple[list[str], list[str]]:
    """The continued texts, and what was written."""
    tokenizer, pieces = load_tokenizer("bytes"), []
    config = SamplingConfig(**{"max_new_tokens": 50, "temperature": 1.0, "top_k": 0} | settings)
    prompts = [torch.tensor(tokenizer.encode(text)) for text in texts]
    return continue_prompts(net, prompts, config, tokenizer, pieces.append), pieces


def test_streamed_text_is_the_whole_text(speaker: Network) -> None:
    prompts = ["The ", "x", "é" * 40]
    whole, written = texts_of(speaker, prompts, stream=False)
    assert written == [f"{text}\n\n" for text in whole]
    assert all(text.startswith(prompt) for text, prompt in zip(whole, prompts, strict=True))
    streamed, pieces = texts_of(speaker, prompts, stream=True)
    assert streamed == whole
    assert "".join(pieces) == "".join(written)
    assert len(pieces) > 50


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_a_text(speaker: Network, stream: bool) -> None:
    prompts = ["The ", "x"]
    (first, second), _ = texts_of(speaker, prompts)
    stop = first[20:23]
    (stopped, other), pieces = texts_of(speaker, prompts, stop=stop, stream=stream)
    assert stopped == "The " + cut(first[4:], [stop])
    assert other == "x" + cut(second[1:], [stop])
    assert "".join(pieces) == f"{stopped}\n\n{other}\n\n"
    assert texts_of(speaker, prompts, stop=["\0\0\0", stop])[0] == [stopped, other]


def test_generation_ends_with_the_stop_string(
    speaker: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, reads, forward = texts_of(speaker, ["The "])[0][0][20:23], [], speaker.forward
    monkeypatch.setattr(speaker, "forward", lambda *a, **k: reads.append(a) or forward(*a, **k))
    texts_of(speaker, ["The "], stop=stop)
    assert 1 < len(reads) < 30


@pytest.mark.parametrize("stream", [None, True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_text_is_streamed_to_a_terminal(
    speaker: Network, stream: bool | None, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    _, pieces = texts_of(speaker, ["The "], stream=stream)
    assert (len(pieces) > 1) == (terminal if stream is None else stream)
