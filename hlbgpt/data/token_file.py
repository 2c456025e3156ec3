"""Token files: tokens behind a small header, written once and then memory-mapped.

bytes 0..7        magic and format version
bytes 8..4091     the header's fields as JSON, padded with spaces
bytes 4092..4095  the CRC-32 of the bytes before, little-endian
bytes 4096..      the tokens, little-endian uint16 or uint32 as the header says
"""

import dataclasses
import json
import mmap
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hlbgpt.data.joined_tokens import JoinedTokens
from hlbgpt.utils.errors import InputError

FORMAT_VERSION = 5
_MAGIC = b"hlbgpt\x00" + bytes([FORMAT_VERSION])
HEADER_BYTES = 4096
_FIELD_BYTES = HEADER_BYTES - 4
_VERIFIED = 1 << 24  # tokens whose checksum is computed at a time


class DamagedFileError(InputError):
    """A token file that is incomplete, changed or of another format, and has to be rebuilt."""


@dataclasses.dataclass(frozen=True)
class Header:
    """Description of a token file, stored in it, or of several that are used as one."""

    tokenizer: str
    vocab_size: int  # of the tokenizer
    dtype: str  # of the tokens: "<u2" or "<u4"
    tokens: int
    text_bytes: int  # in UTF-8
    crc32: int  # of the tokens as stored

    def __post_init__(self) -> None:
        if self.dtype not in ("<u2", "<u4"):
            raise ValueError(f"dtype {self.dtype!r}")

    @property
    def fingerprint(self) -> str:
        """Tells texts apart in records and checkpoints: the checksum of the tokens."""
        return f"{self.crc32:08x}"

    def to_bytes(self) -> bytes:
        """The header as stored: 4096 bytes."""
        fields = (_MAGIC + json.dumps(dataclasses.asdict(self)).encode()).ljust(_FIELD_BYTES)
        return fields + zlib.crc32(fields).to_bytes(4, "little")


class TokenFile:
    """A token file opened for reading.

    Opening it checks the header and the length of the file; `verify` reads the tokens. A process
    that reads beyond the end of a mapped file is killed, so whoever reads `tokens` while others
    may write to the file calls `require_whole` before.

    Attributes:
        path: Path of the file.
        header: Its header.
        tokens: (N,) uint16 or uint32, memory-mapped.

    Raises:
        DamagedFileError: The file is not complete, or is not a token file of this format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = _read_header(path)
        found, itemsize = path.stat().st_size - HEADER_BYTES, np.dtype(self.header.dtype).itemsize
        if found != itemsize * self.header.tokens:
            raise DamagedFileError(
                f"{path}: damaged: its header promises {self.header.tokens} tokens, the file "
                f"holds {max(0, found) // itemsize}"
            )
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.tokens = np.frombuffer(self._map, self.header.dtype, offset=HEADER_BYTES)

    def require_whole(self) -> None:
        """Raise DamagedFileError if the file has been cut since it was opened (about 1 µs)."""
        if self._map.size() < len(self._map):  # the former is that of the file now
            raise DamagedFileError(
                f"{self.path}: cut to {self._map.size()} bytes while in use; start again, and it "
                "is built again"
            )

    def verify(self) -> "TokenFile":
        """Raise DamagedFileError unless the tokens match the header's checksum (about 2 GB/s)."""
        crc = 0
        for start in range(0, len(self.tokens), _VERIFIED):
            self.require_whole()
            crc = zlib.crc32(self.tokens[start : start + _VERIFIED].data, crc)
        if crc != self.header.crc32:
            raise DamagedFileError(
                f"{self.path}: damaged: the tokens do not match the checksum in the header"
            )
        return self


def _read_header(path: Path) -> Header:
    with path.open("rb") as file:
        block = file.read(HEADER_BYTES)
    if not block.startswith(_MAGIC):
        raise DamagedFileError(
            f"{path}: damaged: not a token file of format version {FORMAT_VERSION}"
        )
    fields, checksum = block[:_FIELD_BYTES], block[_FIELD_BYTES:]
    if zlib.crc32(fields).to_bytes(4, "little") != checksum:
        raise DamagedFileError(f"{path}: damaged: the header does not match its checksum")
    try:
        return Header(**json.loads(fields[len(_MAGIC) :]))
    except (ValueError, TypeError) as error:  # of another program
        raise DamagedFileError(f"{path}: damaged: its header cannot be read") from error


class TokenFiles:
    """The token files of a split, opened and read as one.

    Attributes:
        files: The files, in the order of the text.
        header: Of all tokens; of several files, the fingerprint is made from theirs.
        tokens: The tokens, memory-mapped. Reading them from a file that was cut raises
            DamagedFileError.

    Raises:
        DamagedFileError: A file is not complete, or is not a token file of this format.
        InputError: A file is not there any more, or they are too many to be open.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        if len(paths) > 1:
            _allow_open_files(len(paths))
        try:
            self.files = [TokenFile(path) for path in paths]
        except OSError as error:
            raise InputError(
                f"data: {error.filename}: {error.strerror}, though the text was tokenized just "
                f"now into {len(paths)} files; start again if the text or the cache has changed"
            ) from error
        self.header = _joined([file.header for file in self.files])
        self.tokens = JoinedTokens(
            [file.tokens for file in self.files], lambda part: self.files[part].require_whole()
        )


def _joined(headers: list[Header]) -> Header:
    first, *others = headers
    if not others:
        return first
    return dataclasses.replace(
        first,
        tokens=sum(header.tokens for header in headers),
        text_bytes=sum(header.text_bytes for header in headers),
        crc32=zlib.crc32("".join(header.fingerprint for header in headers).encode()),
    )


def _allow_open_files(more: int) -> None:
    """Let this process have `more` open files: a mapped file counts as one, and 1024 are usual."""
    if os.name == "posix":
        import resource

        allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = allowed + more if most == resource.RLIM_INFINITY else min(allowed + more, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
