"""A folder of text files as train, validation and test split."""

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import chain, islice

from hlbgpt.data.sources import (
    SPLIT_PERIOD,
    TextSource,
    drawn_split,
    file_stamps,
    grouped,
    read_utf8,
)
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import expand_path

_BLOCK_CHARS, _MIN_BLOCK_CHARS = 16_000, 1_000
_BLOCK_ENDS = ("\n\n", "\r\n\r\n", "\n", " ")  # best first


class TextFolder(TextSource):
    """All UTF-8 text files of a folder and its sub-folders, in the order of their names.

    The files are cut into blocks of about 16,000 characters, or fewer in a folder of less than
    3 MB, at the end of a paragraph if possible. Of every 20 blocks in a row the 19th is for
    validation and the 20th for test. A blank line follows each file.

    Files of a large folder are tokenized, and their blocks counted, in groups of 64 MiB or more. So
    a file that is added later costs the tokenizing of its group.

    Args:
        folder: Folder with the files. Hidden files and folders in it are ignored.
        pattern: Names of the files, such as `*.txt`, or of a folder and its files, such as
            `poems/*`; one pattern or several. The default is text and Markdown.
    """

    def __init__(
        self,
        folder: str,
        pattern: list[str] | str = ["*.txt", "*.md"],  # noqa: B006 (never changed)
    ) -> None:
        self.folder = str(expand_path(folder, "data.source.folder"))
        self.patterns = [pattern] if isinstance(pattern, str) else pattern

    def files(self) -> list[str]:
        """Return the sorted paths of the files. Raises InputError if there are none."""
        found = []
        for root, folders, names in os.walk(self.folder, onerror=_refuse):
            folders[:] = [name for name in folders if not name.startswith(".")]
            inside = root[len(self.folder) :]
            for name in names:
                matches = (fnmatch(f"{inside}/{name}", f"*/{each}") for each in self.patterns)
                if not name.startswith(".") and any(matches):
                    found.append(os.path.join(root, name))
        if not found:
            raise InputError(
                f"data.source.folder: no {' or '.join(self.patterns)} in {self.folder!r}; set "
                "data.source.pattern to the names of the text files, such as '*.rst'"
            )
        return sorted(found)

    def parts(self, split: str) -> list[TextSource]:
        """Raises InputError for too little text for three splits."""
        if type(self).chunks is not TextFolder.chunks:  # a subclass that changes the text
            return [self]
        return [*self._parts()]

    def _parts(self) -> list["_FolderPart"]:
        files = self.files()
        # Some 60 blocks in a small folder, even where a character has 3 bytes, as in Chinese.
        block_chars = sum(map(os.path.getsize, files)) // (3 * 60)
        block_chars = min(max(block_chars, _MIN_BLOCK_CHARS), _BLOCK_CHARS)
        names = [os.path.relpath(file, self.folder) for file in files]
        parts = [_FolderPart(group, block_chars) for group in grouped(files, names)]
        blocks = chain.from_iterable(part.blocks() for part in parts)
        if len(list(islice(blocks, SPLIT_PERIOD))) < SPLIT_PERIOD:
            raise InputError(
                f"data.source.folder: the text in {self.folder!r} is too short for a train, "
                f"validation and test split; give at least {SPLIT_PERIOD} files or "
                f"{2 * SPLIT_PERIOD * _MIN_BLOCK_CHARS:,} characters, or name a file for each "
                "split (class_path: hlbgpt.data.TextFiles)"
            )
        return parts

    def fingerprint(self, split: str) -> str:
        return file_stamps(self.files())

    def size(self, split: str) -> int:
        return sum(part.size(split) for part in self._parts())

    def chunks(self, split: str) -> Iterator[str]:
        for part in self._parts():
            yield from part.chunks(split)


class _FolderPart(TextSource):
    """Some of a folder's files, whose blocks are counted from their first."""

    def __init__(self, files: list[str], block_chars: int) -> None:
        self.files, self.block_chars = files, block_chars

    def fingerprint(self, split: str) -> str:
        return f"{file_stamps(self.files)}:{self.block_chars}"

    def size(self, split: str) -> int:
        total = sum(map(os.path.getsize, self.files))
        return total * (SPLIT_PERIOD - 2 if split == "train" else 1) // SPLIT_PERIOD

    def chunks(self, split: str) -> Iterator[str]:
        for number, block in enumerate(self.blocks()):
            if drawn_split(number) == split:
                yield block

    def blocks(self) -> Iterator[str]:
        for file in self.files:
            yield from cut(read_utf8(file), self.block_chars)


def cut(pieces: Iterator[str], block_chars: int) -> Iterator[str]:
    """Cut a document into blocks of one to two times `block_chars`; the last may be shorter.

    A block ends at the first blank line after its minimum length, otherwise at a line end or a
    space. The last block ends with a blank line, which is added if necessary.
    """
    held = ""
    for piece in pieces:
        held += piece
        while len(held) > 2 * block_chars:
            end = _block_end(held, block_chars)
            yield held[:end]
            held = held[end:]
    if held:
        yield held.rstrip("\n") + "\n\n"


def _block_end(text: str, block_chars: int) -> int:
    for mark in _BLOCK_ENDS:
        if (place := text.find(mark, block_chars, 2 * block_chars)) >= 0:
            return place + len(mark)
    return 2 * block_chars


def _refuse(error: OSError) -> None:
    raise InputError(
        f"data.source.folder: cannot read folder {str(error.filename)!r} ({error.strerror}); name "
        "a readable folder with text files"
    )
