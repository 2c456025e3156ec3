"""Tokenizers: tiktoken's encodings and special tokens."""

import re
from collections.abc import Iterable, Iterator, Sequence

import tiktoken

from hlbgpt.utils.errors import InputError

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

    def spelling(self) -> list[bytes]:
        """The text of each token by itself."""
        return [self._decode(token) for token in range(self.vocab_size)]

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
