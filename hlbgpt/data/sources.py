"""Text sources: where the text of the train, validation and test split comes from.

To add a source, write a subclass of TextSource and name it in YAML as `data.source.class_path`.
"""

import codecs
import copy
import glob
import hashlib
import os
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import expand_path, require_regular

SPLITS = ("train", "validation", "test")
SPLIT_PERIOD = 20

PART_BYTES = 1 << 26  # fewer would make a large text many small files

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

    def parts(self, split: str) -> Sequence["TextSource"]:
        """Return sources whose texts for `split`, one after another, are that of this source.

        Each part gets a token file of its own, so a text that grows by a part needs to be tokenized
        only there. No token spans two parts. It is computed at every start, as the fingerprint is.
        By default a text is one part.
        """
        return [self]


def drawn_split(number: int, period: int = SPLIT_PERIOD) -> str:
    """Return the split of a block or row: of every `period`, the last two are held out."""
    return {period - 2: "validation", period - 1: "test"}.get(number % period, "train")


def grouped(paths: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """Group the files of a text into parts of at least 64 MiB, but for the last.

    A file is the last of its part if a hash of its name says so, the more likely the larger it is.
    So where a file is added or removed, the parts soon end with the same files as before.

    Args:
        paths: The files, in the order of the text.
        names: Of each what is hashed, which should not depend on where the folder is.
    """
    groups: list[list[str]] = []
    complete, group_bytes = True, 0
    for path, name in zip(paths, names, strict=True):
        if complete:
            groups.append([])
            group_bytes = 0
        groups[-1].append(path)
        size = os.path.getsize(path)
        group_bytes += size
        ends = zlib.crc32(os.fsencode(name)) % PART_BYTES < size
        complete = ends and group_bytes >= PART_BYTES
    return groups


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
    """UTF-8 text files for each split, used byte for byte.

    A split may be several files, whose texts follow one another as they are. They are tokenized in
    groups of 64 MiB or more, so that a file that is added later costs the tokenizing of its group.

    Args:
        folder: Folder with the splits under WikiText's file names: `wiki.train.raw`,
            `wiki.valid.raw` and `wiki.test.raw`, or the same with the ending `.tokens`.
        train: File to use as the training split instead, or several, or a pattern such as
            `texts/train-*.txt`. May be left out with a `data.train_loader` of your own.
        validation: The same for the validation split.
        test: The same for the test split.
    """

    def __init__(
        self,
        folder: str | None = None,
        train: list[str] | str | None = None,
        validation: list[str] | str | None = None,
        test: list[str] | str | None = None,
    ) -> None:
        self.folder = folder
        self.files: dict[str, list[str] | str | None] = {
            "train": train,
            "validation": validation,
            "test": test,
        }

    def paths(self, split: str) -> list[str]:
        """Return the files of `split`. Raises InputError if there are none."""
        if (named := self.files[split]) is not None:
            files = [named] if isinstance(named, str) else named
            return [path for file in files for path in _matching(file, f"data.source.{split}")]
        if self.folder is None:
            raise InputError(
                f"data.source: no text for the {split} split; set folder (with wiki.*.raw) or "
                f"{split} (a text file)"
            )
        folder = expand_path(self.folder, "data.source.folder")
        stem = "wiki." + {"validation": "valid"}.get(split, split)
        for path in (folder / f"{stem}.raw", folder / f"{stem}.tokens"):
            if path.is_file():
                return [str(path)]
        raise InputError(
            f"data.source.folder: no {stem}.raw or {stem}.tokens in {str(folder)!r}; add it or set "
            f"data.source.{split} to a text file"
        )

    def parts(self, split: str) -> list["TextFiles"]:
        if split == "train" and self.folder is None and self.files["train"] is None:
            return []
        paths = self.paths(split)
        groups = grouped(paths, [os.path.basename(path) for path in paths])
        return [self._of(split, group) for group in groups]

    def _of(self, split: str, paths: list[str]) -> "TextFiles":
        """This source, with other files; of a subclass as well."""
        part = copy.copy(self)
        part.files = {**self.files, split: list(paths)}
        return part

    def fingerprint(self, split: str) -> str:
        return file_stamps(self.paths(split))

    def size(self, split: str) -> int:
        return sum(map(os.path.getsize, self.paths(split)))

    def chunks(self, split: str) -> Iterator[str]:
        for path in self.paths(split):
            yield from read_utf8(path)


def _matching(file: str, key: str) -> list[str]:
    """The file that is named, or those that fit the pattern, in the order of their names."""
    path = str(expand_path(file, key))
    if os.path.isfile(path):
        return [path]
    if found := sorted(filter(os.path.isfile, glob.glob(path))):
        return found
    raise InputError(f"{key}: no file {path!r}; name a UTF-8 text file")
