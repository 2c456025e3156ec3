"""Tokenizers, both tiktoken encodings, and encoding of a text stream in bounded memory.

White space below is Unicode's White_Space, which is what the GPT-2 pattern's `\\s` means.
Python's `str.isspace` and `re` count four control characters more.
"""

import re
import sys
from array import array
from collections.abc import Iterable, Iterator
from typing import Literal

import tiktoken

from hlbgpt.utils.errors import InputError

TokenizerName = Literal["gpt2", "bytes"]
VOCAB_SIZES: dict[TokenizerName, int] = {"gpt2": 50257, "bytes": 256}

_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

# A run of white space with a space inside it, and the word that follows; or the end of the text
# after such a space. The second pattern finds it, but for its beginning, where white space is line
# ends and single spaces; it starts with a literal, which `re` looks for much faster.
_WIDE_RUN = re.compile(rf"[{_SPACE}]+ (?:[{_SPACE}]+[^{_SPACE}]*|\Z)")
_BLANK_LINE = re.compile(r"\n (?:\n[ \n]*[^ \n]*|\Z)")
_CUT = re.compile(f"[^{_SPACE}](?=[ \n])")

_CHUNK_CHARS = 1 << 21
_BLOCK_CHARS = 1 << 14
_MEMO_PIECES = 1 << 18
_LONGEST_PIECE = 1 << 24  # characters
_MARK = "\0"


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
    """Encodes text that comes in parts; the tokens equal those of encoding it all at once.

    The GPT-2 pattern always ends a match between a character that is no white space and white
    space, and before a space that a non-space character follows, whatever stands elsewhere. So
    text may be cut into pieces there, mostly words with the space before them. They come again
    and again: each distinct piece of a chunk is encoded once, and remembered for the next chunks.
    """

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self._memo: dict[str, bytes] = {}

    def encode(self, parts: Iterable[str]) -> Iterator[tuple[bytes, int]]:
        """Yield (tokens as little-endian uint16, UTF-8 bytes of the text they stand for)."""
        for text in _safe_chunks(parts, _CHUNK_CHARS):
            yield self._encode(text), len(text.encode("utf-8"))

    def _encode(self, text: str) -> bytes:
        if _MARK in text:
            return self._tokens(text)
        import pyarrow as pa
        import pyarrow.compute as pc

        # Blocks, so that a rare kind of white space slows down its own block only.
        marked = "".join(map(_mark_cuts, _safe_chunks([text], _BLOCK_CHARS)))
        pieces = pc.split_pattern(pa.array([marked]), _MARK).flatten().dictionary_encode()
        tokens = [self._remembered(piece) for piece in pieces.dictionary.to_pylist()]
        joined = pc.take(pa.array(tokens, pa.binary()), pieces.indices)
        return joined.buffers()[2].to_pybytes()

    def _remembered(self, piece: str) -> bytes:
        tokens = self._memo.get(piece)
        if tokens is None:
            if len(self._memo) >= _MEMO_PIECES:
                self._memo.clear()
            tokens = self._memo[piece] = self._tokens(piece)
        return tokens

    def _tokens(self, text: str) -> bytes:
        ids = array("H", self.encoding.encode_ordinary(text))
        if sys.byteorder == "big":
            ids.byteswap()
        return ids.tobytes()


def _mark_cuts(text: str) -> str:
    """`text` with a mark at places to cut: before every space outside wide runs, before those."""
    parts, end = [], 0
    for start, next_end in _wide_runs(text):
        parts += [text[end:start].replace(" ", _MARK + " "), _MARK, text[start:next_end]]
        end = next_end
    parts.append(text[end:].replace(" ", _MARK + " "))
    return "".join(parts)


def _wide_runs(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each wide run in `text` with the word behind it."""
    # Of all white space, only the space is printable.
    if "  " in text or not text.replace("\n", "").isprintable():
        yield from (match.span() for match in _WIDE_RUN.finditer(text))
        return
    for match in _BLANK_LINE.finditer(text):
        start = match.start()
        while start and text[start - 1] in " \n":
            start -= 1
        yield start, match.end()


def _safe_chunks(parts: Iterable[str], size: int) -> Iterator[str]:
    """The same text in chunks of about `size` characters, cut where no token can reach across.

    Raises InputError on millions of characters without a space, for which memory has no bound.
    """
    held, searched = "", 0
    for part in parts:
        for start in range(0, len(part), size):
            held += part[start : start + size]
            if len(held) < size:
                continue
            if cut := _last_cut(held, searched):
                yield held[:cut]
                held, searched = held[cut:], 0
                continue
            searched = len(held) - 1
            if len(held) > _LONGEST_PIECE:
                raise InputError(
                    f"text: {_LONGEST_PIECE} characters without a space or line end; is this a "
                    "text file?"
                )
    if held:
        yield held


def _last_cut(text: str, start: int) -> int | None:
    """The last place in `text` after a non-space character and before a space or line end.

    Before the character at `start` there is none.
    """
    for begin in (max(start, len(text) - 256), start):  # nearly always close to the end
        found = [match.end() for match in _CUT.finditer(text, begin)]
        if found:
            return found[-1]
    return None
