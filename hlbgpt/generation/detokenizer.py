"""Streaming detokenizer: turns tokens into text while they are generated, up to a stop string."""

import codecs
from collections.abc import Callable, Sequence

from hlbgpt.data.tokenizer import Tokenizer


class StreamingDetokenizer:
    """Decodes one text token by token.

    A token may end inside a UTF-8 character or inside a stop string, so text that later tokens may
    still change is held back. The text ends before the first stop string to be complete, the
    longest if several are.

    Args:
        tokenizer: The tokenizer.
        stop: Stop strings, none of them empty.
        write: Called with each new piece of text.

    Attributes:
        text: The prompt and its continuation, without text that is held back.
        stopped: Whether a stop string has ended the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        write: Callable[[str], None] | None = None,
    ) -> None:
        self.text, self.stopped = "", False
        self._tokenizer, self._stop, self._write = tokenizer, stop, write
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = ""

    def add_prompt(self, tokens: list[int]) -> None:
        """Decode the prompt, in which stop strings are ignored."""
        self._emit(self._utf8.decode(self._tokenizer.decode_bytes(tokens)))

    def add_token(self, token: int) -> bool:
        """Decode the next token; returns False once a stop string has ended the text."""
        self._add(self._utf8.decode(self._tokenizer.decode_bytes([token])))
        return not self.stopped

    def finalize(self) -> None:
        """Write what was held back, because no more tokens will come."""
        if not self.stopped:
            self._add(self._utf8.decode(b"", final=True))
        if not self.stopped:
            self._emit(self._pending)

    def _add(self, piece: str) -> None:
        for character in piece:
            self._pending += character
            if complete := [stop for stop in self._stop if self._pending.endswith(stop)]:
                self.stopped = True
                self._emit(self._pending[: -max(map(len, complete))])
                return
        final = 0  # characters before the first that may begin a stop string
        while not any(stop.startswith(self._pending[final:]) for stop in [*self._stop, ""]):
            final += 1
        self._emit(self._pending[:final])
        self._pending = self._pending[final:]

    def _emit(self, piece: str) -> None:
        self.text += piece
        if piece and self._write is not None:
            self._write(piece)
