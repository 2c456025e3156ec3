"""Token files: tokens behind a small header, written once and then memory-mapped.

bytes 0..7       magic and format version
bytes 8..4095    the header's fields as JSON, padded with spaces
bytes 4096..     the tokens, little-endian uint16 or uint32 as the header says
"""

import contextlib
import dataclasses
import hashlib
import json
import mmap
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich import progress

from hlbgpt.data.encoder import Encoder
from hlbgpt.data.sources import TextSource
from hlbgpt.data.tokenizer import Tokenizer
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import atomic_write, locked

FORMAT_VERSION = 4
_MAGIC = b"hlbgpt\x00" + bytes([FORMAT_VERSION])
_HEADER_BYTES = 4096
_VERIFIED = 1 << 24  # tokens whose checksum is computed at a time


class DamagedFileError(InputError):
    """A token file that is incomplete, changed or of another format, and has to be rebuilt."""


@dataclasses.dataclass(frozen=True)
class Header:
    """Description of a token file, stored in it."""

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
        found, itemsize = path.stat().st_size - _HEADER_BYTES, np.dtype(self.header.dtype).itemsize
        if found != itemsize * self.header.tokens or found == 0:
            raise DamagedFileError(
                f"{path}: damaged: its header promises {self.header.tokens} tokens, the file "
                f"holds {max(0, found) // itemsize}"
            )
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.tokens = np.frombuffer(self._map, self.header.dtype, offset=_HEADER_BYTES)

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
        block = file.read(_HEADER_BYTES)
    if not block.startswith(_MAGIC):
        raise DamagedFileError(
            f"{path}: damaged: not a token file of format version {FORMAT_VERSION}"
        )
    try:
        return Header(**json.loads(block[len(_MAGIC) :]))
    except (ValueError, TypeError) as error:
        raise DamagedFileError(f"{path}: damaged: its header cannot be read") from error


def _identity(source: TextSource, split: str) -> str:
    """Return what identifies a text: the class of its source and the source's fingerprint."""
    return f"{type(source).__module__}.{type(source).__qualname__}:{source.fingerprint(split)}"


def token_file_path(
    cache: Path, source: TextSource, split: str, tokenizer: str, special_tokens: Sequence[str] = ()
) -> Path:
    """Return the path of a token file; its name depends on text, tokenizer and format version."""
    key = f"{FORMAT_VERSION}|{tokenizer}|{list(special_tokens)}|{_identity(source, split)}"
    return cache / f"{split}-{tokenizer}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.tokens"


def prepare_token_file(
    path: Path, source: TextSource, split: str, tokenizer: Callable[[], Tokenizer]
) -> TokenFile:
    """Open the token file at `path`; tokenize `split` of `source` into it first if necessary.

    An existing file is verified, and built again if it is damaged. Tokenizing takes bounded
    memory and shows a progress bar. If several processes need the file, one builds it and the
    others wait.

    Raises:
        InputError: The text is empty or cannot be read, or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError, DamagedFileError):
            return TokenFile(path).verify()
        with locked(path.parent, wait=False) as free:
            if not free:
                print(f"waiting for another process that builds token files in {path.parent}")
        with locked(path.parent, wait=True):
            # Another process may have built the file meanwhile.
            try:
                return TokenFile(path).verify()
            except FileNotFoundError:
                pass
            except DamagedFileError as error:
                print(f"{error}; building it again")
            with atomic_write(path) as temporary:
                _write(temporary, source, split, tokenizer())
            return TokenFile(path)
    except OSError as error:
        raise InputError(
            f"data: {error.filename or path}: {error.strerror or error}; data.source must be "
            "readable, and data.cache_dir a folder that can be written and has room"
        ) from error


def _write(path: Path, source: TextSource, split: str, tokenizer: Tokenizer) -> None:
    crc = stored = size = 0
    made_from = _identity(source, split)
    columns = *progress.Progress.get_default_columns(), progress.TransferSpeedColumn()
    with Encoder(tokenizer) as encoder, progress.Progress(*columns) as bar, path.open("wb") as file:
        task = bar.add_task(f"tokenizing {split}", total=source.size(split))
        file.write(bytes(_HEADER_BYTES))
        for encoded, text_bytes in encoder.stream(source.chunks(split)):
            file.write(encoded)
            crc = zlib.crc32(encoded, crc)
            stored += len(encoded)
            size += text_bytes
            bar.update(task, completed=size)
        bar.update(task, total=size)
        if stored == 0:
            raise InputError(
                f"data.source: the {split} split is empty; name a file that contains text"
            )
        if _identity(source, split) != made_from:
            raise InputError(
                f"data.source: the {split} split changed while it was tokenized; start again "
                "once no process is writing to it"
            )
        header = Header(
            str(tokenizer),
            vocab_size=tokenizer.vocab_size,
            dtype=tokenizer.dtype,
            tokens=stored // np.dtype(tokenizer.dtype).itemsize,
            text_bytes=size,
            crc32=crc,
        )
        file.seek(0)
        file.write((_MAGIC + json.dumps(dataclasses.asdict(header)).encode()).ljust(_HEADER_BYTES))
