"""The token file: uint16 tokens behind a small header, written once, then memory-mapped.

    bytes 0..7       magic and format version
    bytes 8..4095    the header's fields as JSON, padded with spaces
    bytes 4096..     the tokens, little-endian uint16

It is written under a temporary name and renamed when whole. Opening it checks magic, version and
length at no cost; `verify` reads the tokens and compares the checksum, as every start of a run
does, once.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import tiktoken
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from hlbgpt.data.sources import TextSource
from hlbgpt.data.tokenizer import StreamEncoder
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import locked

FORMAT_VERSION = 2
_MAGIC = b"hlbgpt\x00" + bytes([FORMAT_VERSION])
_HEADER_BYTES = 4096


class DamagedFileError(InputError):
    """A token file that is not whole, or of an older format: to be built again."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What a token file says of itself."""

    tokenizer: str
    vocab_size: int
    source: str  # the text source's fingerprint
    split: str
    tokens: int
    text_bytes: int  # in UTF-8
    crc32: int  # of the tokens as stored

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type:
                raise TypeError(f"{field.name}: {value!r} is no {field.type}")

    def pack(self) -> bytes:
        fields = json.dumps(dataclasses.asdict(self)).encode()
        if len(fields) > _HEADER_BYTES - len(_MAGIC):
            raise ValueError(f"header of {len(fields)} bytes does not fit")
        return (_MAGIC + fields).ljust(_HEADER_BYTES)


class TokenFile:
    """A token file opened for reading.

    Attributes:
        path: Where it lies.
        header: Its header.
        tokens: (N,) uint16, memory-mapped.

    Raises:
        DamagedFileError: it is not whole, or of another format version.
        InputError: it is no token file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = _read_header(path)
        found = path.stat().st_size - _HEADER_BYTES
        if found != 2 * self.header.tokens:
            raise DamagedFileError(
                f"{path}: cut short or overwritten: its header promises {self.header.tokens} "
                f"tokens, the file holds {found // 2}"
            )
        # An empty file cannot be mapped; an empty split is refused elsewhere, with its own words.
        self.tokens: np.ndarray = (
            np.memmap(path, dtype="<u2", mode="r", offset=_HEADER_BYTES)
            if found
            else np.empty(0, dtype="<u2")
        )

    def require(self, *, tokenizer: str, source: str, split: str) -> None:
        """Raise InputError unless the file was made from exactly these."""
        wanted = {"tokenizer": tokenizer, "split": split, "source": source}
        for field, value in wanted.items():
            if (found := getattr(self.header, field)) != value:
                raise InputError(
                    f"{self.path}: made with {field} {found!r}, but this run asks for {value!r}; "
                    "delete it, and it is built again"
                )

    def verify(self) -> None:
        """Raise DamagedFileError unless the tokens match the header's checksum (about 2 GB/s)."""
        if zlib.crc32(self.tokens.data) != self.header.crc32:
            raise DamagedFileError(
                f"{self.path}: damaged: the tokens do not match the checksum in the header"
            )


def _read_header(path: Path) -> Header:
    with path.open("rb") as file:
        block = file.read(_HEADER_BYTES)
    magic, fields = block[: len(_MAGIC)], block[len(_MAGIC) :]
    if magic[:-1] != _MAGIC[:-1]:
        raise InputError(f"{path}: not a token file of hlbgpt; delete it or move it away")
    if magic != _MAGIC:
        raise DamagedFileError(
            f"{path}: token file of format {magic[-1:].hex()}, this version reads "
            f"{FORMAT_VERSION:02x}"
        )
    try:
        return Header(**json.loads(fields))
    except (ValueError, TypeError) as error:
        raise DamagedFileError(f"{path}: damaged: its header cannot be read") from error


def identity(source: TextSource, split: str) -> str:
    """What a token file says of its text: sources of two classes never share one."""
    return f"{type(source).__module__}.{type(source).__qualname__}:{source.fingerprint(split)}"


def token_file_path(cache: Path, source: TextSource, split: str, tokenizer: str) -> Path:
    """Where the token file lies: the name changes with the text, the tokenizer and the format."""
    key = f"{FORMAT_VERSION}|{tokenizer}|{identity(source, split)}"
    return cache / f"{split}-{tokenizer}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.tokens"


def prepare_token_file(
    path: Path, source: TextSource, split: str, encoding: Callable[[], tiktoken.Encoding]
) -> TokenFile:
    """Open `path`, after tokenizing one split of `source` into it where it is not there whole.

    Takes bounded memory and shows a progress bar. Of several processes that ask at once, one
    builds and the others wait. The checksum of a file that is there is verified.

    Raises:
        InputError: the text is empty or not readable, or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (file := _open_whole(path)) is not None:
            return file
        with locked(path.parent, wait=False) as free:
            if not free:
                print(f"waiting for another process that builds token files in {path.parent}")
        with locked(path.parent, wait=True):
            if (file := _open_whole(path)) is not None:
                return file
            _remove_leftovers(path.parent)
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            try:
                _write(temporary, source, split, encoding())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        where = error.filename or path
        key = "cache_dir" if Path(where).parent in (path.parent, *path.parent.parents) else "source"
        hint = "; set data.cache_dir to a folder with room" if key == "cache_dir" else ""
        raise InputError(f"data.{key}: {where}: {error.strerror or error}{hint}") from error
    return TokenFile(path)


def _open_whole(path: Path) -> TokenFile | None:
    """The token file at `path`; None, with a word of why, if it is to be built."""
    if not path.exists():
        return None
    try:
        file = TokenFile(path)
        file.verify()
    except DamagedFileError as error:
        print(f"{error}: building it again")
        return None
    return file


def _remove_leftovers(folder: Path) -> None:
    """What builds that were killed left behind; the lock says that none is under way."""
    if os.name == "posix":
        for leftover in folder.glob("*.tokens.*.tmp"):
            leftover.unlink(missing_ok=True)


def _write(path: Path, source: TextSource, split: str, encoding: tiktoken.Encoding) -> None:
    crc = tokens = size = 0
    made_from = identity(source, split)
    # Closed at once: an error would leave the bar to draw itself whenever it is collected.
    with contextlib.closing(_with_progress(source, split)) as pieces, path.open("wb") as file:
        file.write(bytes(_HEADER_BYTES))
        for encoded, text_bytes in StreamEncoder(encoding).encode(pieces):
            file.write(encoded)
            crc = zlib.crc32(encoded, crc)
            tokens += len(encoded) // 2
            size += text_bytes
        if tokens == 0:
            raise InputError(f"data.source: the {split} split is empty; name a text with words")
        if identity(source, split) != made_from:
            raise InputError(
                f"data.source: the {split} split changed while it was tokenized; start again when "
                "nobody writes to it"
            )
        header = Header(
            tokenizer=encoding.name,
            vocab_size=encoding.n_vocab,
            source=made_from,
            split=split,
            tokens=tokens,
            text_bytes=size,
            crc32=crc,
        )
        file.seek(0)
        file.write(header.pack())
        file.flush()
        os.fsync(file.fileno())


def _with_progress(source: TextSource, split: str) -> Generator[str, None, None]:
    """The text of `split`, with a bar that shows MB, MB/s and the time left on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )

    def pieces() -> Generator[str, None, None]:
        with Progress(*columns) as progress:
            task = progress.add_task(f"tokenizing {split}", total=source.size(split))
            done = 0
            for piece in source.chunks(split):
                yield piece
                done += len(piece.encode("utf-8"))
                progress.update(task, completed=done)
            progress.update(task, completed=done, total=done)

    return pieces()
