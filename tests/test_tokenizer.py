"""Tokens of a text that comes in pieces equal those of the whole text, and special tokens."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex  # tiktoken needs it too
import tiktoken
from helpers import synthetic_encoding
from hypothesis import example, given, settings
from hypothesis import strategies as st

import hlbgpt.data.encoder as encoder
from hlbgpt.data.encoder import Encoder
from hlbgpt.data.tokenizer import Tokenizer, load_tokenizer
from hlbgpt.utils.errors import InputError

# White space of every kind, controls that only Python takes for white space, letters of all cases,
# marks, digits, punctuation, contractions, and characters of two to four bytes.
ALPHABET = [*" \0\n\r\t\x85\u3000\x1c\x1fabAB1'.!/éÉǅʰ\u0301٣½漢𝄞", " \n", " \n \n", "\r\n", "\n/"]
ALPHABET += ["  ", "'s", "'LL", "'\u017f", " the", "<|u|>", "<|u"]
TEXTS = st.lists(st.sampled_from(ALPHABET)).map("".join) | st.text()
SPECIAL = st.lists(
    st.sampled_from(["<|u|>", "<|u", " ", "\n", " a", "ab", "abA", "a\n b", "\n/", "漢", ".*"]),
    unique=True,
    max_size=4,
)


class Pieces:
    """An encoding whose tokens are the pieces of a pattern: no cut is hidden by equal tokens."""

    special_tokens_set, n_vocab = frozenset(), 1 << 20

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.name, self.ids = encoding.name, {}
        self.pattern = regex.compile(encoding._pat_str.replace("$", r"\Z"))

    def encode_ordinary(self, text: str) -> list[int]:
        return [self.ids.setdefault(p, len(self.ids)) for p in self.pattern.findall(text)]


@functools.cache
def encoding_named(name: str) -> Any:
    """`name` is an encoding of tiktoken, `bytes`, or "pieces of" one; "mine" is an unknown one."""
    if name.startswith("pieces of "):
        return Pieces(encoding_named(name.removeprefix("pieces of ")))
    if name == "mine":
        encoding = Pieces(encoding_named("o200k_base"))
        encoding.name, encoding.pattern = "mine", regex.compile(r"(?s)a.*b(?=.*B)|.")
        return encoding
    return load_tokenizer("bytes").encoding if name == "bytes" else synthetic_encoding(name)


NAMES = sorted({"bytes", *tiktoken.list_encoding_names()} & encoder._CUTS.keys())
PIECES = [f"pieces of {name}" for name in ("gpt2", "cl100k_base", "o200k_base")]
encodings = pytest.mark.parametrize("name", [*NAMES, *PIECES, "mine"])


def encoded(tokenizer: Tokenizer, pieces: list[str]) -> tuple[list[int], int]:
    parts = list(Encoder(tokenizer).stream(pieces))
    tokens = np.frombuffer(b"".join(part for part, _ in parts), dtype=tokenizer.dtype)
    return tokens.tolist(), sum(size for _, size in parts)


def whole(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens by definition: special tokens from left to right, the longest first."""
    start, tokens = 0, []
    for place in range(len(text)):
        found = [each for each in tokenizer.special_tokens if text.startswith(each, place)]
        if found and place >= start:
            special = max(found, key=len)
            tokens += tokenizer.encoding.encode_ordinary(text[start:place])
            number = list(tokenizer.special_tokens).index(special)
            tokens.append(tokenizer.encoding.n_vocab + number)
            start = place + len(special)
    return tokens + tokenizer.encoding.encode_ordinary(text[start:])


@encodings
@settings(max_examples=150)
@given(pieces=st.lists(TEXTS), chunk=st.integers(1, 12), special=SPECIAL)
@example(pieces=["a  "], chunk=4, special=[])
@example(pieces=[" a\u3000 \n b\u3000 "], chunk=12, special=[])
@example(pieces=["a \n", " \n", "b"], chunk=12, special=[])
@example(pieces=["!\x1c \x1c b"], chunk=12, special=[])
@example(pieces=["a \0 b", "  \0"], chunk=12, special=[])
@example(pieces=["a!\n\n", "\n b", "\n/c"], chunk=3, special=[])
@example(pieces=["!\r\n", "/a /b"], chunk=3, special=[])
@example(pieces=["a. ab", "ab abA"], chunk=5, special=["abA", "ab"])
@example(pieces=["aa a\n bcc", " d"], chunk=3, special=["a\n b"])
@example(pieces=["a a b", " B"], chunk=3, special=[])
def test_pieces_give_the_tokens_of_the_whole(
    name: str, pieces: list[str], chunk: int, special: list[str]
) -> None:
    text = "".join(pieces)
    ours = Tokenizer(encoding_named(name), special)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "_CHUNK_CHARS", chunk)
        patch.setattr(encoder, "_CACHED_PIECES", 3)
        tokens, size = encoded(ours, pieces)
    assert tokens == whole(ours, text) == ours.encode(text)
    assert size == len(text.encode())


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_a_long_text_is_cut_often(
    name: str, test_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """English at spaces, code and Chinese without a space at line ends."""
    monkeypatch.setattr(encoder, "_CHUNK_CHARS", 4000)
    english = (test_data / "wikitext" / "wiki.test.raw").read_bytes().decode()[:300_000]
    for text in (english, Path(encoder.__file__).read_text() * 9, "漢字。\n\n漢字\n" * 9000):
        pieces = [text[i : i + 1007] for i in range(0, len(text), 1007)]
        ours = Tokenizer(encoding_named(name))
        assert encoded(ours, pieces)[0] == ours.encoding.encode_ordinary(text)
        assert len(list(Encoder(ours).stream(pieces))) > len(text) // 6000


@pytest.mark.parametrize("special", [[], ["<|user|>"]])
def test_single_characters_are_no_single_chunk(
    special: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "_CHUNK_CHARS", 10)
    chunks = Encoder(load_tokenizer("bytes", special)).stream("two words and more " * 50)
    assert len(list(chunks)) > 40


@given(text=TEXTS)
def test_gpt2_tokens(gpt2: tiktoken.Encoding, text: str) -> None:
    assert encoded(Tokenizer(gpt2), [text])[0] == gpt2.encode_ordinary(text)


def test_gpt2_tokens_of_wikitext(gpt2: tiktoken.Encoding, test_data) -> None:
    text = (test_data / "wikitext" / "wiki.test.raw").read_bytes().decode()
    pieces = [text[i : i + 10_007] for i in range(0, len(text), 10_007)]
    tokens, size = encoded(Tokenizer(gpt2), pieces)
    assert tokens == gpt2.encode_ordinary(text)
    assert (len(tokens), size) == (286_221, 1_290_590)


def test_bytes_are_their_own_tokens() -> None:
    text = "Grüße, 漢字 \n"
    assert encoded(load_tokenizer("bytes"), [text])[0] == list(text.encode())


def test_special_tokens_are_numbered_from_the_end_of_the_vocabulary() -> None:
    ours = Tokenizer(encoding_named("cl100k_base"), ["<|user|>", "é "])
    assert (ours.vocab_size, str(ours)) == (100_279, "cl100k_base + 2 special tokens")
    tokens = ours.encode("é <|user|>a<|endoftext|>")
    assert tokens[:2] == [100_278, 100_277]
    assert tokens[2:] == ours.encoding.encode_ordinary("a<|endoftext|>")  # ordinary text
    assert ours.decode_bytes(tokens).decode() == "é <|user|>a<|endoftext|>"
    # 100257 is the encoding's own, 100270 one of the numbers that it leaves out.
    assert ours.decode_bytes([100_257, 100_270, 97]) == b"<|endoftext|>a"


@pytest.mark.parametrize(
    ("special", "message"),
    [
        (["a", ""], "data.special_tokens: '' is empty"),
        (["a", "b", "a"], "data.special_tokens: 'a' is given twice"),
        (["<|endoftext|>"], "'<|endoftext|>' is a special token of gpt2 already"),
        ("<|user|>", "data.special_tokens: '<|user|>' is not a list of texts"),
        ([1], r"data.special_tokens: \[1\] is not a list of texts"),
    ],
)
def test_bad_special_tokens_are_one_line(special: Any, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("|", r"\|")):
        Tokenizer(encoding_named("gpt2"), special)


@pytest.mark.parametrize(("highest", "dtype"), [(65_535, "<u2"), (65_536, "<u4")])
def test_as_many_bits_as_the_vocabulary_needs(highest: int, dtype: str) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks[b"ab"] = highest
    ours = Tokenizer(
        tiktoken.Encoding("bytes", pat_str=r"\w+", mergeable_ranks=ranks, special_tokens={})
    )
    assert ours.dtype == dtype
    assert encoded(ours, ["abc"])[0] == [highest, ord("c")]


def test_text_without_a_space_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_LONGEST_WORD", 1000)
    monkeypatch.setattr(encoder, "_CHUNK_CHARS", 100)
    with pytest.raises(InputError, match="1000 characters without the end of a word"):
        encoded(load_tokenizer("bytes"), ["x" * 500] * 4)


def test_an_unknown_name_is_answered_with_the_names() -> None:
    names = "bytes, gpt2, .*cl100k_base, o200k_base"
    with pytest.raises(InputError, match=f"data.tokenizer: unknown tokenizer 'gpt5'; .*{names}"):
        load_tokenizer("gpt5")


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("gpt2", r"vocab\.bpe and encoder\.json"),
        ("cl100k_base", r"cl100k_base\.tiktoken"),
        ("p50k_edit", r"p50k_base\.tiktoken"),
    ],
)
def test_missing_files_are_named(name: str, files: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> tiktoken.Encoding:
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(InputError, match=f"cannot download {files} .*TIKTOKEN_CACHE_DIR"):
        load_tokenizer(name)
