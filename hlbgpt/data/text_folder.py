"""A folder of text files, cut into blocks of which some are validation and some test."""

import hashlib
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from hlbgpt.data.sources import SPLITS, TextSource, read_utf8
from hlbgpt.utils.errors import InputError

_BLOCK = 1 << 14  # characters, about
_ENDS = ("\n\n", "\n", " ")  # where a block may end, the best first
_EVERY = 20  # one of so many blocks is validation, another test
_SMALL = 1 << 24  # bytes; in more than that the draw finds blocks for every split


class Block(NamedTuple):
    """A part of a file: the file's name within the folder, and the block's number in the file."""

    file: str
    number: int

    @property
    def draw(self) -> int:
        """A number from 0 to 2^64 that looks drawn at random."""
        key = f"{self.number} {self.file}".encode("utf-8", "surrogateescape")
        return int.from_bytes(hashlib.sha256(key).digest()[:8], "big")

    @property
    def drawn_split(self) -> str:
        return {0: "validation", 1: "test"}.get(self.draw % _EVERY, "train")


class TextFolder(TextSource):
    """All UTF-8 text files of a folder and of the folders in it, in the order of their names.

    Every file is cut into blocks of some 16,000 characters, where a paragraph ends if it can be. A
    twentieth of the blocks is the validation split and another the test split, drawn by the file's
    name and the block's number: the same every time, and blocks stay in their split when files
    come or go. Where so little is drawn from a small folder that a split would have less than half
    of its share, the next blocks in the order of the draw are added to it.

    A blank line follows each file, and each block whose successor is in another split.

    Args:
        folder: Where the files lie; hidden files and folders in it are passed over.
        pattern: Names of the files, such as `*.txt`, or with their folders, such as `poems/*`; or
            several; by default text and Markdown.
    """

    def __init__(
        self,
        folder: str,
        pattern: list[str] | str = ["*.txt", "*.md"],  # noqa: B006 (never changed)
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.patterns = [pattern] if isinstance(pattern, str) else pattern

    def files(self) -> dict[str, os.stat_result]:
        """The files by their names within the folder; raises InputError if there are none."""
        if not self.folder.is_dir():
            raise InputError(
                f"data.source.folder: no folder {str(self.folder)!r}; name one with text files"
            )
        # Strings rather than paths: there may be a million files.
        found, endings, top = {}, set(), os.path.join(self.folder, "")
        for root, folders, names in os.walk(self.folder, onerror=_give_up):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = os.path.join(root, name)
                within = path.removeprefix(top).replace(os.sep, "/")
                if name.startswith("."):
                    continue
                if any(fnmatchcase(name, p) or fnmatchcase(within, p) for p in self.patterns):
                    found[within] = os.stat(path)
                else:
                    endings.add(os.path.splitext(name)[1] or name)
        if not found:
            others = [f"*{ending}" for ending in sorted(endings)[:8]]
            raise InputError(
                f"data.source.folder: no {' or '.join(self.patterns)} in {str(self.folder)!r}, "
                f"only {', '.join(others) or 'nothing'}; set data.source.pattern, such as '*.rst'"
            )
        return dict(sorted(found.items()))

    def fingerprint(self, split: str) -> str:
        digest = hashlib.sha256()
        for name, stat in self.files().items():
            line = f"{name}:{stat.st_size}:{stat.st_mtime_ns};"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return f"folder:1:{self.folder.resolve()}:{digest.hexdigest()}"

    def size(self, split: str) -> int:
        share = _EVERY - 2 if split == "train" else 1
        return self._bytes() * share // _EVERY

    def _bytes(self) -> int:
        return sum(stat.st_size for stat in self.files().values())

    def chunks(self, split: str) -> Iterator[str]:
        """Block by block; raises InputError for a folder with too little text for three splits."""
        moved, before, ends = self._moved(), None, ""
        for block, text in self._blocks():
            if moved.get(block, block.drawn_split) != split:
                continue
            if before is not None and block != (before.file, before.number + 1):
                yield _missing_line_ends(ends)
            yield text
            before, ends = block, text[-2:]
        if before is not None:
            yield _missing_line_ends(ends)

    def _blocks(self) -> Iterator[tuple[Block, str]]:
        for name in self.files():
            for number, text in enumerate(cut(read_utf8(self.folder / name))):
                yield Block(name, number), text

    def _moved(self) -> dict[Block, str]:
        """Blocks of a small folder that are in another split than drawn, for it would lack them."""
        if self._bytes() > _SMALL:
            return {}
        splits: dict[str, dict[Block, int]] = {split: {} for split in SPLITS}
        for block, text in self._blocks():
            splits[block.drawn_split][block] = len(text)
        total = sum(sum(sizes.values()) for sizes in splits.values())
        moved: dict[Block, str] = {}

        def move(source: str, target: str) -> None:
            block = min(splits[source], key=lambda block: block.draw)
            splits[target][block] = splits[source].pop(block)
            moved[block] = target

        for split in SPLITS:
            largest = max(splits, key=lambda split: len(splits[split]))
            if not splits[split] and len(splits[largest]) > 1:
                move(largest, split)
        if not all(splits.values()):
            raise InputError(
                f"data.source.folder: {total} characters in {str(self.folder)!r} are too few for a "
                f"train, validation and test split; give at least three files or {4 * _BLOCK:,} "
                "characters, or name the splits yourself (class_path: hlbgpt.data.TextFiles)"
            )
        for split in SPLITS[1:]:
            while sum(splits[split].values()) < total // (2 * _EVERY) and len(splits["train"]) > 1:
                move("train", split)
        return moved


def _give_up(error: OSError) -> None:
    raise error


def _missing_line_ends(text: str) -> str:
    """What has to follow `text` for a blank line."""
    return "\n" * (2 - (len(text) - len(text.rstrip("\n"))))


def cut(pieces: Iterator[str]) -> Iterator[str]:
    """The same text in blocks of one to two times 16,384 characters; the last may be shorter.

    A block ends at the first blank line past its minimum, or else line end, or else space. However
    the text comes in pieces, the blocks are the same.
    """
    held = ""
    for piece in pieces:
        held += piece
        start = 0
        while len(held) - start >= 2 * _BLOCK:
            end = _block_end(held, start)
            yield held[start:end]
            start = end
        held = held[start:]
    while held:
        end = _block_end(held, 0) if len(held) > _BLOCK else len(held)
        yield held[:end]
        held = held[end:]


def _block_end(text: str, start: int) -> int:
    least, most = start + _BLOCK, start + 2 * _BLOCK
    for end in _ENDS:
        if (place := text.find(end, least, most)) >= 0:
            return place + len(end)
    return min(len(text), most)
