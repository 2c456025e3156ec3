"""Tokenizers, both tiktoken encodings, and encoding of a text stream in bounded memory.

White space below is Unicode's White_Space, which is what the GPT-2 pattern's `\\s` means.
Python's `str.isspace` and `re` count four control characters more.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import tiktoken

from hlbgpt.errors import InputError

TokenizerName = Literal["gpt2", "bytes"]
VOCAB_SIZES: dict[TokenizerName, int] = {"gpt2": 50257, "bytes": 256}

_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

# A run of white space with a space inside it, and the word that follows; or the end of the text
# after such a space.
_WIDE_RUN = re.compile(rf"([{_SPACE}]+ (?:[{_SPACE}]+[^{_SPACE}]*|\Z))")
_CUT = re.compile(f"[^{_SPACE}](?=[ \n])")

_CHUNK_CHARS = 1 << 18
_LONGEST_MEMO = 40  # characters; longer words hardly ever come again
_MEMO_WORDS = 1 << 18
_LONGEST_WORD = 1 << 24


def load_tokenizer(name: TokenizerName) -> tiktoken.Encoding:
    """The encoding called `name`: `gpt2` (50257 tokens) or `bytes` (256, nothing to download).

    Raises InputError if the GPT-2 files are neither in tiktoken's cache nor to be downloaded.
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
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong hash ValueError
        raise InputError(
            "data.tokenizer: cannot download the GPT-2 files vocab.bpe and encoder.json "
            f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that holds them, or "
            "use the tokenizer 'bytes'"
        ) from error


class StreamEncoder:
    """Encodes text that comes in pieces; the tokens equal those of encoding it all at once.

    The GPT-2 pattern always ends a piece between a character that is no white space and white
    space, and before a space that a non-space character follows, whatever stands elsewhere. So
    text may be cut there, memory stays bounded, and the tokens of a word with the space before it
    can be remembered: words come again and again, and looking one up is faster than encoding it.
    """

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self._words = _Memo(encoding, prefix=" ")
        self._runs = _Memo(encoding, prefix="")

    def encode(self, pieces: Iterable[str]) -> Iterator[tuple[bytes, int]]:
        """Yield (tokens as little-endian uint16, UTF-8 bytes of the text they stand for)."""
        for text in _safe_chunks(pieces):
            yield self._encode(text), len(text.encode("utf-8"))

    def _encode(self, text: str) -> bytes:
        parts = []
        for i, part in enumerate(_WIDE_RUN.split(text)):
            if i % 2:
                parts.append(self._runs[part])
            elif part:
                # Here white space stands before or after each space, never on both sides, so
                # every space starts a piece.
                first, *words = part.split(" ")
                parts.append(self._runs[first] if first else b"")
                parts.extend(map(self._words.__getitem__, words))
        return b"".join(parts)


class _Memo(dict[str, bytes]):
    """Tokens of `prefix` + word for each word looked up, forgotten when there are too many."""

    def __init__(self, encoding: tiktoken.Encoding, *, prefix: str) -> None:
        super().__init__()
        self._encoding, self._prefix = encoding, prefix

    def __missing__(self, word: str) -> bytes:
        ids = self._encoding.encode_ordinary(self._prefix + word)
        tokens = np.asarray(ids, dtype="<u2").tobytes()
        if len(word) <= _LONGEST_MEMO:
            if len(self) >= _MEMO_WORDS:
                self.clear()
            self[word] = tokens
        return tokens


def _safe_chunks(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in chunks that end where no token can reach across.

    Raises InputError on millions of characters without a space, for which memory has no bound.
    """
    held: list[str] = []
    for piece in pieces:
        for start in range(0, len(piece), _CHUNK_CHARS):
            part = piece[start : start + _CHUNK_CHARS]
            cut = _last_cut(part)
            if cut is None:
                held.append(part)
                if sum(map(len, held)) > _LONGEST_WORD:
                    raise InputError(
                        f"text: {_LONGEST_WORD} characters without a space or line end; is this "
                        "a text file?"
                    )
                continue
            yield "".join([*held, part[:cut]])
            held = [part[cut:]]
    if rest := "".join(held):
        yield rest


def _last_cut(text: str) -> int | None:
    """The last place in `text` after a non-space character and before a space or line end."""
    for width in (256, len(text)):  # nearly always close to the end
        tail = len(text) - min(width, len(text))
        found = [match.end() for match in _CUT.finditer(text, tail)]
        if found:
            return found[-1]
    return None
