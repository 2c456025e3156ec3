"""Tokenizers (tiktoken encodings), and encoding of a text of any length in bounded memory."""

import re
import struct
from collections.abc import Iterable, Iterator
from typing import Literal

import tiktoken

from hlbgpt.utils.errors import InputError

TokenizerName = Literal["gpt2", "bytes"]
VOCAB_SIZES: dict[TokenizerName, int] = {"gpt2": 50257, "bytes": 256}

# Unicode's White_Space, which is what `\s` means in GPT-2's pattern. Python's `\s` and
# `str.isspace` count four control characters more.
_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LAST_WORD_END = re.compile(f".*[^{_SPACE}](?=[{_SPACE}])", re.DOTALL)
# A space after white space and before white space or the end of the text.
_INNER_SPACE = re.compile(f" (?![^{_SPACE}])(?<![^{_SPACE}] )")
_INNER_SPACE_MARK = "\0"

_CHUNK_CHARS = 1 << 20
_LONGEST_WORD = 1 << 24  # characters
_CACHED_PIECES = 1 << 18


def load_tokenizer(name: TokenizerName) -> tiktoken.Encoding:
    """Return the encoding `gpt2` (50257 tokens) or `bytes` (256 tokens, nothing to download).

    Raises:
        InputError: The name is unknown, or GPT-2's files are neither cached nor downloadable.
    """
    if name == "bytes":
        return tiktoken.Encoding(
            "bytes",
            pat_str=r"[\s\S]",
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={},
        )
    if name != "gpt2":
        raise InputError(f"data.tokenizer: unknown tokenizer {name!r}; choose gpt2 or bytes")
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # network errors are OSErrors, a wrong hash ValueError
        raise InputError(
            "data.tokenizer: cannot download the GPT-2 files vocab.bpe and encoder.json "
            f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that holds them, or "
            "use the tokenizer 'bytes'"
        ) from error


def encode_stream(encoding: tiktoken.Encoding, parts: Iterable[str]) -> Iterator[tuple[bytes, int]]:
    """Encode a text that comes in parts; the tokens equal those of encoding it at once.

    Yields:
        Tokens as little-endian uint16, and the number of UTF-8 bytes that they stand for.
    """
    cache = _PieceCache(encoding)
    for text in _chunks(parts):
        yield cache.encode_chunk(text), len(text.encode())


class _PieceCache(dict[str, bytes]):
    """Encodes text piece by piece and remembers the tokens of each piece.

    GPT-2's pattern splits a text into words, each with the space before it, and byte-pair encodes
    every word on its own. A word always ends before white space, and where white space precedes a
    word, the last space of it belongs to the word. So the text can be cut before every space
    except those after white space that more white space, or the end of the text, follows. The
    resulting pieces, mostly single words, repeat so often that a dictionary is several times
    faster than encoding them all.

    Keys are pieces without the space in front, values are tokens as little-endian uint16.
    """

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        super().__init__()
        self._encoding = encoding

    def encode_chunk(self, text: str) -> bytes:
        """Encode a text that starts and ends at a boundary of words."""
        if _INNER_SPACE_MARK in text:
            return self._encode(text)
        if len(self) > _CACHED_PIECES:
            self.clear()
        first, *pieces = _INNER_SPACE.sub(_INNER_SPACE_MARK, text).split(" ")
        first_tokens = self._encode(first.replace(_INNER_SPACE_MARK, " "))
        return first_tokens + b"".join(map(self.__getitem__, pieces))

    def __missing__(self, piece: str) -> bytes:
        tokens = self[piece] = self._encode(" " + piece.replace(_INNER_SPACE_MARK, " "))
        return tokens

    def _encode(self, text: str) -> bytes:
        tokens = self._encoding.encode_ordinary(text)
        return struct.pack(f"<{len(tokens)}H", *tokens)


def _chunks(parts: Iterable[str]) -> Iterator[str]:
    """Yield the same text in chunks of about a million characters that end where a word ends.

    Raises:
        InputError: No white space in 16 million characters; memory would have no bound.
    """
    held, searched = "", 0
    for part in parts:
        held += part
        if len(held) < _CHUNK_CHARS:
            continue
        if match := _LAST_WORD_END.match(held, searched):
            yield held[: match.end()]
            held, searched = held[match.end() :], 0
        elif len(held) > _LONGEST_WORD:
            raise InputError(
                f"text: {_LONGEST_WORD} characters without the end of a word; is this a text file?"
            )
        else:
            searched = len(held) - 1
    if held:
        yield held
