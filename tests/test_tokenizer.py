"""Tokens of a text that comes in pieces equal those of the whole text."""

import itertools

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st

import hlbgpt.data.tokenizer as tokenizer
from hlbgpt.data.tokenizer import encode_stream, load_tokenizer
from hlbgpt.utils.errors import InputError

# White space of every kind, controls that only Python takes for white space, letters, digits,
# punctuation, contractions, and characters of two to four bytes.
ALPHABET = [*" \0\n\t\r\x85\u3000\x1c\x1fab1'.é漢𝄞", " \n", " \n \n", "  ", "'s", "'ll", " the"]
TEXTS = st.lists(st.sampled_from(ALPHABET)).map("".join) | st.text()


def gpt2_pattern() -> tiktoken.Encoding:
    """GPT-2's pattern with a vocabulary of all bytes, all pairs of ASCII ones and some longer."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    merges = [bytes(pair) for pair in itertools.product(b" \n\tabthels1'.", repeat=2)]
    for merge in [*merges, b" \n\n", b"  \n", b" the", b"the", b"'ll", "é".encode()]:
        ranks.setdefault(merge, len(ranks))
    from tiktoken_ext.openai_public import r50k_pat_str

    return tiktoken.Encoding(
        "like-gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
    )


@pytest.fixture(scope="module", params=["pattern", "bytes"])
def encoding(request: pytest.FixtureRequest) -> tiktoken.Encoding:
    return gpt2_pattern() if request.param == "pattern" else load_tokenizer("bytes")


def encoded(encoding: tiktoken.Encoding, pieces: list[str]) -> tuple[list[int], int]:
    parts = list(encode_stream(encoding, pieces))
    tokens = np.frombuffer(b"".join(part for part, _ in parts), dtype="<u2")
    return tokens.tolist(), sum(size for _, size in parts)


@given(pieces=st.lists(TEXTS), chunk=st.integers(1, 12))
@example(pieces=["a  "], chunk=4)
@example(pieces=[" a\u3000 \n b\u3000 "], chunk=12)
@example(pieces=["a \n", " \n", "b"], chunk=12)
@example(pieces=["!\x1c \x1c b"], chunk=12)
@example(pieces=["a \0 b", "  \0"], chunk=12)
def test_pieces_give_the_tokens_of_the_whole(
    encoding: tiktoken.Encoding, pieces: list[str], chunk: int
) -> None:
    text = "".join(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "_CHUNK_CHARS", chunk)
        patch.setattr(tokenizer, "_CACHED_PIECES", 3)
        tokens, size = encoded(encoding, pieces)
    assert tokens == encoding.encode_ordinary(text)
    assert size == len(text.encode())


@given(text=TEXTS)
def test_gpt2_tokens(gpt2: tiktoken.Encoding, text: str) -> None:
    assert encoded(gpt2, [text])[0] == gpt2.encode_ordinary(text)


def test_gpt2_tokens_of_wikitext(gpt2: tiktoken.Encoding, test_data) -> None:
    text = (test_data / "wikitext" / "wiki.test.raw").read_bytes().decode()
    pieces = [text[i : i + 10_007] for i in range(0, len(text), 10_007)]
    tokens, size = encoded(gpt2, pieces)
    assert tokens == gpt2.encode_ordinary(text)
    assert (len(tokens), size) == (286_221, 1_290_590)


def test_bytes_are_their_own_tokens() -> None:
    text = "Grüße, 漢字 \n"
    assert encoded(load_tokenizer("bytes"), [text])[0] == list(text.encode())


def test_text_without_a_space_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_LONGEST_WORD", 1000)
    monkeypatch.setattr(tokenizer, "_CHUNK_CHARS", 100)
    with pytest.raises(InputError, match="1000 characters without the end of a word"):
        encoded(load_tokenizer("bytes"), ["x" * 500] * 4)


def test_missing_gpt2_files_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> tiktoken.Encoding:
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(InputError, match=r"vocab\.bpe and encoder\.json.*TIKTOKEN_CACHE_DIR"):
        load_tokenizer("gpt2")
