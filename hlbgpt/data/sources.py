"""Text sources: where the text of the train, validation and test split comes from.

To add a source, write a subclass of TextSource and name it in YAML as `data.source.class_path`.
"""

import codecs
import hashlib
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path

from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import expand_path, require_regular

SPLITS = ("train", "validation", "test")
SPLIT_PERIOD = 20

_BLOCK_BYTES = 1 << 16
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 12  # read at every start, however many files there are


class TextSource(ABC):
    """Text in three splits."""

    @abstractmethod
    def fingerprint(self, split: str) -> str:
        """Return a short line that changes whenever the text of `split` may have changed.

        It is part of the cache key of the token file and is computed at every start, so it should
        depend on names, sizes and dates of files, and read little of them: see `file_stamps`.
        """

    @abstractmethod
    def chunks(self, split: str) -> Iterator[str]:
        """Yield the text of `split` in order, in pieces of bounded size that may end anywhere."""

    def size(self, split: str) -> int | None:
        """Estimate the UTF-8 bytes of `split` for the progress bar; None if not known."""
        return None


def drawn_split(number: int, period: int = SPLIT_PERIOD) -> str:
    """Return the split of a block or row: of every `period`, the last two are held out."""
    return {period - 2: "validation", period - 1: "test"}.get(number % period, "train")


def file_stamps(paths: Iterable[str | Path]) -> str:
    """Return a hash that changes with the path, size or modification time of any of the files.

    Files can change and keep both, as copies with `cp -p` do. So 16 blocks of 4 KiB are hashed too,
    spread evenly over the bytes of all files together, the first and the last of them included. A
    change that keeps sizes and times and lies between these blocks is not noticed.

    Raises:
        InputError: A pipe, a socket or a device is among the files.
        OSError: A file cannot be read.
    """
    digest = hashlib.sha256()
    files: list[str | Path] = []
    ends: list[int] = []  # of each file, among the bytes of all
    for path in paths:
        stat = require_regular(path, "data.source")
        digest.update(os.fsencode(os.path.abspath(path)))
        digest.update(f":{stat.st_size}:{stat.st_mtime_ns};".encode())
        files.append(path)
        ends.append((ends[-1] if ends else 0) + stat.st_size)
    for number, offset in _sample_places(ends):
        with open(files[number], "rb", buffering=0) as file:
            file.seek(offset)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _sample_places(ends: list[int]) -> list[tuple[int, int]]:
    """Where the sampled blocks begin, as (number of the file, offset), of files with these ends."""
    if not ends or ends[-1] == 0:
        return []
    places: dict[tuple[int, int], None] = {}
    for sample in range(_SAMPLES):
        byte = sample * (ends[-1] - 1) // (_SAMPLES - 1)  # within the block
        number = bisect_right(ends, byte)
        begin = ends[number - 1] if number else 0
        last = max(0, ends[number] - begin - _SAMPLE_BYTES)
        places[number, min(byte - begin, last)] = None
    return list(places)


def read_utf8(path: str | Path) -> Iterator[str]:
    """Yield the text of a file in pieces of at most 64 KiB.

    Raises:
        InputError: The file is not UTF-8 or holds a NUL; the message names the byte. Or it is a
            pipe, a socket or a device.
    """
    require_regular(path, "data.source")
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with open(path, "rb") as file:
        while True:
            block = file.read(_BLOCK_BYTES)
            incomplete = len(decoder.getstate()[0])  # bytes of a character that the cut split
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}: not UTF-8 text at byte {offset - incomplete + error.start} "
                    f"({error.reason}); convert the file to UTF-8"
                ) from error
            if (nul := block.find(b"\0")) >= 0:
                raise InputError(
                    f"{path}: not text: byte {offset + nul} is NUL; if the file is UTF-16, convert "
                    "it to UTF-8"
                )
            if text:
                yield text
            if not block:
                return
            offset += len(block)


class TextFiles(TextSource):
    """Three UTF-8 text files, used byte for byte.

    Args:
        folder: Folder with the splits under WikiText's file names: `wiki.train.raw`,
            `wiki.valid.raw` and `wiki.test.raw`, or the same with the ending `.tokens`.
        train: File to use as the training split instead.
        validation: File to use as the validation split instead.
        test: File to use as the test split instead.
    """

    def __init__(
        self,
        folder: str | None = None,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
    ) -> None:
        self.folder = folder
        self.files = {"train": train, "validation": validation, "test": test}

    def path(self, split: str) -> Path:
        """Return the file of `split`. Raises InputError if there is none."""
        if (file := self.files[split]) is not None:
            path = expand_path(file, f"data.source.{split}")
            if not path.is_file():
                raise InputError(
                    f"data.source.{split}: no file {str(path)!r}; name a UTF-8 text file"
                )
            return path
        if self.folder is None:
            raise InputError(
                f"data.source: no text for the {split} split; set folder (with wiki.*.raw) or "
                f"{split} (a text file)"
            )
        folder = expand_path(self.folder, "data.source.folder")
        stem = "wiki." + {"validation": "valid"}.get(split, split)
        for path in (folder / f"{stem}.raw", folder / f"{stem}.tokens"):
            if path.is_file():
                return path
        raise InputError(
            f"data.source.folder: no {stem}.raw or {stem}.tokens in {str(folder)!r}; add it or set "
            f"data.source.{split} to a text file"
        )

    def fingerprint(self, split: str) -> str:
        return file_stamps([self.path(split)])

    def size(self, split: str) -> int:
        return self.path(split).stat().st_size

    def chunks(self, split: str) -> Iterator[str]:
        return read_utf8(self.path(split))
