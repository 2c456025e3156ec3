"""Tokenizers (tiktoken encodings), and encoding of a text of any length in bounded memory."""

import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import tiktoken

from hlbgpt.utils.errors import InputError

# Unicode's White_Space, which is what `\s` means in tiktoken's patterns. Python's `\s` and
# `str.isspace` count four control characters more.
_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_INNER_SPACE_MARK = "\0"

_CHUNK_CHARS = 1 << 20
_LONGEST_WORD = 1 << 24  # characters
_CACHED_PIECES = 1 << 18


class _Cuts(NamedTuple):
    """Where a text can be cut so that its parts have the tokens of the whole."""

    last: re.Pattern[str]  # matches from the start of a text to the last place for a cut
    inner_space: re.Pattern[str]  # a space that is no such place; all others are, in front of them


# GPT-2's pattern splits a text into words, each with the space before it. A word ends before white
# space, and of several white-space characters before a word, the last belongs to the word if it is
# a space. Other spaces, after white space and before white space or the end of the text, do not.
_GPT2_CUTS = _Cuts(
    re.compile(f".*[^{_SPACE}](?=[{_SPACE}])", re.DOTALL),
    re.compile(f" (?![^{_SPACE}])(?<![^{_SPACE}] )"),
)
# In cl100k's and o200k's patterns, line ends belong to the punctuation or white space before them,
# and in o200k's so do slashes after line ends. But no piece continues from a character that is not
# white space to a space, nor from a line end to anything but white space and slashes.
_CL100K_CUTS = _Cuts(
    re.compile(f".*(?:[^{_SPACE}](?= )|[\r\n](?=[^{_SPACE}/]))", re.DOTALL),
    re.compile(f"(?<![^{_SPACE}]) "),
)
_CUTS = dict.fromkeys(("bytes", "gpt2", "r50k_base", "p50k_base", "p50k_edit"), _GPT2_CUTS)
_CUTS |= dict.fromkeys(("cl100k_base", "o200k_base", "o200k_harmony"), _CL100K_CUTS)

_FILES = {
    "gpt2": "vocab.bpe and encoder.json",
    "p50k_edit": "p50k_base.tiktoken",
    "o200k_harmony": "o200k_base.tiktoken",
}


class Tokenizer:
    """An encoding, and special tokens of your own, numbered from the end of its vocabulary.

    A special token in a text becomes that one token. They are looked for from left to right, the
    longest first, and the text between them is encoded by itself. The encoding's own special
    tokens, such as `<|endoftext|>`, are ordinary text.

    Args:
        encoding: The encoding.
        special_tokens: Texts of the special tokens.

    Attributes:
        name: Name of the encoding.
        vocab_size: One more than the highest token.
        dtype: NumPy type that holds the tokens: `<u2` up to 65,536 of them, else `<u4`.

    Raises:
        InputError: A special token is empty, given twice, or one of the encoding's own.
    """

    def __init__(self, encoding: tiktoken.Encoding, special_tokens: Sequence[str] = ()) -> None:
        _require_new(special_tokens, encoding)
        self.encoding, self.name, self.special_tokens = encoding, encoding.name, special_tokens
        self.vocab_size = encoding.n_vocab + len(special_tokens)
        self.dtype = "<u2" if self.vocab_size <= 1 << 16 else "<u4"
        self.longest_special = max(map(len, special_tokens), default=1)
        self._ids = {text: encoding.n_vocab + i for i, text in enumerate(special_tokens)}
        self._bytes = {token: text.encode() for text, token in self._ids.items()}
        longest_first = map(re.escape, sorted(special_tokens, key=len, reverse=True))
        self._special = re.compile(f"({'|'.join(longest_first)})") if special_tokens else None

    def __str__(self) -> str:
        count = len(self.special_tokens)
        plural = "s" if count > 1 else ""
        return f"{self.name} + {count} special token{plural}" if count else self.name

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`."""
        tokens: list[int] = []
        for part, special in self.split(text):
            tokens += self.encoding.encode_ordinary(part) if special is None else [special]
        return tokens

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Yield special tokens and the texts between them, each with the token that it is."""
        for part in self._special.split(text) if self._special else [text]:
            yield part, self._ids.get(part)

    def skip_special(self, text: str, place: int) -> int:
        """Return `place`, or if it is inside a special token, the end of that."""
        for match in self._special.finditer(text) if self._special else ():
            if match.end() > place:
                return match.end() if match.start() < place else place
        return place

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The text of `tokens` in UTF-8, which may begin and end inside a character.

        Numbers that the encoding leaves out below its highest token stand for no text.
        """
        return b"".join(map(self._decode, tokens))

    def _decode(self, token: int) -> bytes:
        if token in self._bytes:
            return self._bytes[token]
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:
            return b""


def _require_new(special_tokens: Sequence[str], encoding: tiktoken.Encoding) -> None:
    if isinstance(special_tokens, str) or not all(isinstance(x, str) for x in special_tokens):
        raise InputError(f"data.special_tokens: {special_tokens!r} is not a list of texts; use one")
    seen: set[str] = set()
    for token in special_tokens:
        if not token:
            problem = "is empty"
        elif token in seen:
            problem = "is given twice"
        elif token in encoding.special_tokens_set:
            problem = f"is a special token of {encoding.name} already"
        else:
            seen.add(token)
            continue
        raise InputError(f"data.special_tokens: {token!r} {problem}; give each a text of its own")


def require_tokenizer(name: str, key: object = "data.tokenizer") -> None:
    """Raise InputError, which begins with `key`, for a name that `load_tokenizer` does not know."""
    if name not in (names := ["bytes", *tiktoken.list_encoding_names()]):
        raise InputError(f"{key}: unknown tokenizer {name!r}; there are {', '.join(names)}")


def load_tokenizer(name: str, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """Return `bytes` (256 tokens, nothing to download) or one of tiktoken's encodings.

    Raises:
        InputError: The name is unknown, the encoding's files are neither cached nor downloadable,
            or `special_tokens` are not valid.
    """
    require_tokenizer(name)
    if name == "bytes":
        encoding = tiktoken.Encoding(
            "bytes",
            pat_str=r"[\s\S]",
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={},
        )
        return Tokenizer(encoding, special_tokens)
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # network errors are OSErrors, a wrong hash ValueError
        raise InputError(
            f"data.tokenizer: cannot download {_FILES.get(name, f'{name}.tiktoken')} of {name} "
            f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder with such files as "
            "tiktoken keeps them, or use the tokenizer 'bytes'"
        ) from error
    return Tokenizer(encoding, special_tokens)


def encode_stream(tokenizer: Tokenizer, parts: Iterable[str]) -> Iterator[tuple[bytes, int]]:
    """Encode a text that comes in parts; the tokens equal those of encoding it at once.

    Memory is bounded with the encodings that tiktoken 0.14 has. The pattern of any other is
    unknown, so its texts are encoded at once.

    Yields:
        Tokens as `tokenizer.dtype`, and the number of UTF-8 bytes that they stand for.
    """
    cuts = _CUTS.get(tokenizer.name)
    cache = _PieceCache(tokenizer, cuts)
    for text in ["".join(parts)] if cuts is None else _chunks(parts, tokenizer, cuts):
        yield cache.encode_chunk(text), len(text.encode())


class _PieceCache(dict[str, bytes]):
    """Encodes text piece by piece and remembers the tokens of each piece.

    The pieces between the spaces at which the text can be cut, mostly single words, repeat so
    often that a dictionary is several times faster than encoding them all.

    Keys are pieces without the space in front, values are tokens as stored.
    """

    def __init__(self, tokenizer: Tokenizer, cuts: _Cuts | None) -> None:
        super().__init__()
        self._split, self._encode_ordinary = tokenizer.split, tokenizer.encoding.encode_ordinary
        self._cuts = cuts
        self._code = {"<u2": "H", "<u4": "I"}[tokenizer.dtype]

    def encode_chunk(self, text: str) -> bytes:
        """Encode a text that starts and ends at places for a cut, with its special tokens."""
        return b"".join(
            self._encode_pieces(part) if special is None else struct.pack(f"<{self._code}", special)
            for part, special in self._split(text)
        )

    def _encode_pieces(self, text: str) -> bytes:
        if self._cuts is None or _INNER_SPACE_MARK in text:
            return self._encode(text)
        if len(self) > _CACHED_PIECES:
            self.clear()
        first, *pieces = self._cuts.inner_space.sub(_INNER_SPACE_MARK, text).split(" ")
        first_tokens = self._encode(first.replace(_INNER_SPACE_MARK, " "))
        return first_tokens + b"".join(map(self.__getitem__, pieces))

    def __missing__(self, piece: str) -> bytes:
        tokens = self[piece] = self._encode(" " + piece.replace(_INNER_SPACE_MARK, " "))
        return tokens

    def _encode(self, text: str) -> bytes:
        tokens = self._encode_ordinary(text)
        return struct.pack(f"<{len(tokens)}{self._code}", *tokens)


def _chunks(parts: Iterable[str], tokenizer: Tokenizer, cuts: _Cuts) -> Iterator[str]:
    """Yield the same text in chunks of about a million characters that end at places for a cut.

    Raises:
        InputError: No such place in 16 million characters; memory would have no bound.
    """
    held, searched = "", 0
    for part in parts:
        held += part
        if len(held) < _CHUNK_CHARS:
            continue
        # Special tokens that begin before `known` are complete.
        known = len(held) - tokenizer.longest_special + 1
        if match := cuts.last.match(held, searched, known):
            end = tokenizer.skip_special(held, match.end())
            yield held[:end]
            held, searched = held[end:], 0
        elif len(held) > _LONGEST_WORD:
            raise InputError(
                f"text: {_LONGEST_WORD} characters without the end of a word; is this a text file?"
            )
        else:
            searched = max(0, known - 1)
    if held:
        yield held
