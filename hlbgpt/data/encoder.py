"""Encoding of a text of any length, in bounded memory and in several processes."""

import contextlib
import multiprocessing
import os
import re
import signal
import struct
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from hlbgpt.data.tokenizer import Tokenizer
from hlbgpt.utils.errors import InputError

# Unicode's White_Space, which is what `\s` means in tiktoken's patterns. Python's `\s` and
# `str.isspace` count four control characters more.
_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_INNER_SPACE_MARK = "\0"

_CHUNK_CHARS = 1 << 20
_LONGEST_WORD = 1 << 24  # characters
_CACHED_PIECES = 1 << 18
_CHUNKS_ALONE = 16  # before other processes are worth their start
_MOST_PROCESSES = 16  # more would wait for the one that reads the text


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


class Encoder(contextlib.ExitStack):
    """Encodes texts that come in pieces; the tokens equal those of encoding each text at once.

    A text is cut into chunks. Those of a long one are encoded by other processes, as many as there
    are CPUs, and come back in order. Memory is bounded with the encodings that tiktoken 0.14 has.
    The pattern of any other is unknown, so its texts are encoded at once. Leaving the context ends
    the processes.

    Args:
        tokenizer: The tokenizer.
        processes: Other processes at most; 0 for none. By default the CPUs that this process may
            use. Only Linux can start them without importing everything anew.
    """

    def __init__(self, tokenizer: Tokenizer, processes: int | None = None) -> None:
        super().__init__()
        self.tokenizer, self._cuts = tokenizer, _CUTS.get(tokenizer.name)
        self._cache = _PieceCache(tokenizer, self._cuts)
        self._processes = _usable_cpus() if processes is None else processes
        self._chunks_alone = 0
        self._pool: ProcessPoolExecutor | None = None

    def stream(self, pieces: Iterable[str]) -> Iterator[tuple[bytes, int]]:
        """Encode one text.

        Yields:
            Tokens as `tokenizer.dtype`, and the number of UTF-8 bytes that they stand for.
        """
        pending: deque[tuple[Future[bytes], int]] = deque()
        for text in self._chunks(pieces):
            if not self._in_processes():
                yield self._cache.encode_chunk(text), len(text.encode())
                continue
            pending.append((self._submit(text), len(text.encode())))
            if len(pending) > 2 * self._processes:
                yield self._next_of(pending)
        while pending:
            yield self._next_of(pending)

    def _chunks(self, pieces: Iterable[str]) -> Iterator[str]:
        if self._cuts is None:
            return iter(["".join(pieces)])
        return _chunks(pieces, self.tokenizer, self._cuts)

    def _in_processes(self) -> bool:
        """Whether the next chunk is one for the other processes."""
        if self._chunks_alone < _CHUNKS_ALONE or self._processes < 2:
            self._chunks_alone += 1
            return False
        return True

    def _submit(self, text: str) -> "Future[bytes]":
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._processes,
                # Forked, they need no import of torch, and no guard in a user's script.
                mp_context=multiprocessing.get_context("fork"),
                initializer=_begin_process,
                initargs=(self._cache,),
            )
            self.callback(self._pool.shutdown, cancel_futures=True)
        with _one_line():
            return self._pool.submit(_encode, text)

    def _next_of(self, pending: "deque[tuple[Future[bytes], int]]") -> tuple[bytes, int]:
        future, text_bytes = pending.popleft()
        with _one_line():
            return future.result(), text_bytes


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise InputError(
            "data: a process that tokenizes was killed, perhaps for lack of memory; start again"
        ) from error


def _usable_cpus() -> int:
    if sys.platform != "linux":
        return 0
    return min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))


# --- in the other processes -----------------------------------------------------------------------

_cache_of_process: "_PieceCache"


def _begin_process(cache: "_PieceCache") -> None:
    global _cache_of_process
    _cache_of_process = cache
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A thread of the first process, such as that of a progress bar, may hold the lock of the old.
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leave no process behind where the first is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(text: str) -> bytes:
    return _cache_of_process.encode_chunk(text)


# --- chunks and pieces ----------------------------------------------------------------------------


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
