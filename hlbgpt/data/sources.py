"""Text sources: each hands out the train, validation and test text, piece by piece.

A new source is one class with three methods; name it in YAML as `data.source.class_path`.
"""

import codecs
import hashlib
import itertools
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from hlbgpt.utils.errors import InputError

SPLITS = ("train", "validation", "test")

WIKITEXT, WIKITEXT_NAME = "Salesforce/wikitext", "wikitext-103-raw-v1"
# The commit of the hub's repository from which the official raw files can be restored.
WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"

_SPLIT_NAMES = dict.fromkeys(("val", "valid", "dev"), "validation")
_BLOCK_BYTES = 1 << 20


class TextSource(ABC):
    """Where the text of the three splits comes from."""

    @abstractmethod
    def fingerprint(self, split: str) -> str:
        """A line that changes whenever the text of `split` may have changed.

        It names the cached token file, so it must be cheap: it looks at names, sizes and dates,
        and reads no text.
        """

    @abstractmethod
    def chunks(self, split: str) -> Iterator[str]:
        """The text of `split` in order, cut anywhere, in pieces of bounded size."""

    def size(self, split: str) -> int | None:
        """About how many UTF-8 bytes `split` has, for the progress bar; None if not known."""
        return None


def stamps(paths: Iterable[Path]) -> str:
    """A line that changes with the name, size or date of any file; a long one as its hash."""
    line = ";".join(map(_stamp, paths))
    # It has to fit into the header of a token file.
    return line if len(ascii(line)) < 3000 else hashlib.sha256(line.encode()).hexdigest()


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


def read_utf8(path: Path) -> Iterator[str]:
    """The text of a file in pieces of about a megabyte.

    Raises InputError, with the place in bytes, for what is not UTF-8, and for NUL.
    """
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while True:
            block = file.read(_BLOCK_BYTES)
            held = len(decoder.getstate()[0])  # start of a character cut by the last block
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}: not UTF-8 text at byte {done - held + error.start} "
                    f"({error.reason}); convert the file to UTF-8"
                ) from error
            if "\0" in text:
                place = done - held + len(text[: text.index("\0")].encode())
                raise InputError(
                    f"{path}: not text: byte {place} is NUL; if the file is UTF-16, convert it "
                    "to UTF-8"
                )
            if text:
                yield text
            if not block:
                return
            done += len(block)


class TextFiles(TextSource):
    """Three UTF-8 text files, taken byte for byte.

    Args:
        folder: Folder with the splits under WikiText's own names, `wiki.train.raw`,
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
        self.named = {"train": train, "validation": validation, "test": test}

    def path(self, split: str) -> Path:
        """The file of `split`. Raises InputError where there is none."""
        if (name := self.named[split]) is not None:
            path = Path(name).expanduser()
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
        folder = Path(self.folder).expanduser()
        if not folder.is_dir():
            raise InputError(
                f"data.source.folder: no folder {str(folder)!r}; it should hold wiki.train.raw, "
                "wiki.valid.raw and wiki.test.raw"
            )
        stem = "wiki." + {"validation": "valid"}.get(split, split)
        for path in (folder / f"{stem}.raw", folder / f"{stem}.tokens"):
            if path.is_file():
                return path
        raise InputError(
            f"data.source.folder: {str(folder)!r} has no {stem}.raw or {stem}.tokens; add it or "
            f"set data.source.{split} to a text file"
        )

    def fingerprint(self, split: str) -> str:
        return f"file:{stamps([self.path(split)])}"

    def size(self, split: str) -> int:
        return self.path(split).stat().st_size

    def chunks(self, split: str) -> Iterator[str]:
        return read_utf8(self.path(split))


class HubText(TextSource):
    """A data set of the Hugging Face hub, or a local folder of parquet files laid out like one.

    WikiText, which is `Salesforce/wikitext` or a folder of the name of one of its configurations,
    becomes the official raw files byte for byte: its rows are their lines, except that a blank
    line, `" \\n"` there, is the row `""` here and is put back. A row of any other data set is a
    document, and a blank line follows it.

    A split called val, valid or dev is the validation split. Where there is no validation or no
    test split, some rows of the train split, drawn by their number, are taken for it, which is
    said: a hundredth, but at least 100 (of few rows a tenth) and at most 1000.

    Args:
        path: Name of the data set on the hub, or a local folder.
        name: Configuration of the data set; in a local folder, the sub-folder of that name if
            there is one. By default its only one, and for WikiText `wikitext-103-raw-v1`.
        revision: Commit of the hub's repository, to pin, so that the text can never change; by
            default the newest, which is not looked for again once it is tokenized, and for
            WikiText a fixed one.
        text_column: Column that holds the text.
        rows: Whether rows are `lines` or `documents`; by default as above.
    """

    def __init__(
        self,
        path: str = WIKITEXT,
        name: str | None = None,
        revision: str | None = None,
        text_column: str = "text",
        rows: Literal["lines", "documents"] | None = None,
    ) -> None:
        on_hub = path == WIKITEXT
        self.path, self.text_column, self.rows = path, text_column, rows
        self.name = WIKITEXT_NAME if name is None and on_hub else name
        self.revision = WIKITEXT_REVISION if revision is None and on_hub else revision

    @cached_property
    def _folder(self) -> Path | None:
        """The local folder with the parquet files, or None if the text is on the hub."""
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            if self.path.startswith((".", "/", "~")):
                raise InputError(f"data.source.path: no folder {self.path!r}")
            return None
        named = folder / (self.name or WIKITEXT_NAME)
        return named if named.is_dir() else folder

    @property
    def _where(self) -> str:
        if self._folder is not None:
            return str(self._folder)
        return f"{self.path} ({self.name})" if self.name else self.path

    @property
    def _rows_are_lines(self) -> bool:
        if self.rows is not None:
            return self.rows == "lines"
        return self.path == WIKITEXT or (
            self._folder is not None and self._folder.name.startswith("wikitext-")
        )

    def fingerprint(self, split: str) -> str:
        rows = "" if self._rows_are_lines else ":documents"
        if self._folder is None:
            return f"hub:{self.path}/{self.name}@{self.revision}:{self.text_column}{rows}"
        files = sorted(self._folder.rglob("*.parquet"))
        if not files:
            raise InputError(f"data.source.path: no parquet files in {str(self._folder)!r}")
        return f"parquet:{self.text_column}{rows}:{stamps(files)}"

    @cached_property
    def _splits(self) -> dict[str, Any]:
        """All splits, downloaded and prepared by `datasets` (imported only here)."""
        import datasets

        try:
            if self._folder is None:
                found = datasets.load_dataset(self.path, self.name, revision=self.revision)
            else:
                found = datasets.load_dataset(str(self._folder))
        # A RuntimeError refuses a data set that comes with a script.
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split()) or repr(error)
            raise InputError(
                f"data.source: cannot load {self._where}: {reason:.400}; check path, name and the "
                "network, or use text files (class_path: hlbgpt.data.TextFiles)"
            ) from error
        return {_SPLIT_NAMES.get(name, name): self._with_text(rows) for name, rows in found.items()}

    def _with_text(self, rows: Any) -> Any:
        """`rows` with the text column alone."""
        column = rows.features.get(self.text_column)
        if column is None:
            raise InputError(
                f"data.source.text_column: {self._where} has no column {self.text_column!r}, only "
                + ", ".join(rows.column_names)
            )
        if (kind := getattr(column, "dtype", column)) not in ("string", "large_string"):
            raise InputError(
                f"data.source.text_column: {self.text_column!r} of {self._where} holds {kind}, no "
                f"text; the columns are {', '.join(rows.column_names)}"
            )
        return rows.select_columns([self.text_column])

    def _rows(self, split: str) -> Any:
        if split not in self._splits:
            raise InputError(
                f"data.source.path: {self._where} has no {split} split, only "
                f"{', '.join(self._splits)}; use another, or text files (class_path: "
                "hlbgpt.data.TextFiles)"
            )
        return self._splits[split]

    @cached_property
    def _drawn(self) -> dict[str, list[int]]:
        """Numbers of the train rows that are taken for each split there is not."""
        missing = [split for split in SPLITS[1:] if split not in self._splits]
        if self._rows_are_lines or not missing:
            return {}
        total = len(self._rows("train"))
        drawn = draw_rows(total)
        for split in missing:
            print(
                f"{self._where} has no {split} split: {len(drawn[split])} of its {total} train "
                "rows, drawn by their number, are taken for it"
            )
        return {split: drawn[split] for split in missing}

    def size(self, split: str) -> int:
        if split not in self._drawn:
            return int(self._rows(split).data.nbytes)
        train = self._rows("train")
        return int(train.data.nbytes * len(self._drawn[split]) / len(train))

    def chunks(self, split: str) -> Iterator[str]:
        """The rows that are drawn come in order; the train split goes without them."""
        if split in self._drawn:
            rows, left_out = self._rows("train").select(self._drawn[split]), set()
        else:
            rows = self._rows(split)
            left_out = set().union(*self._drawn.values()) if split == "train" else set()
        at_once = max(1, min(1000, _BLOCK_BYTES * len(rows) // max(1, self.size(split))))
        for first, batch in zip(itertools.count(0, at_once), rows.iter(batch_size=at_once)):
            texts = batch[self.text_column]
            if left_out:
                texts = [text for i, text in enumerate(texts, first) if i not in left_out]
            if self._rows_are_lines:
                yield "".join(text or " \n" for text in texts)
            else:
                stripped = (text.strip("\n") for text in texts if text)
                yield "".join(f"{text}\n\n" for text in stripped if text)


def draw_rows(total: int) -> dict[str, list[int]]:
    """Of `total` rows those for validation and for test: one each of every so many, in order.

    Raises InputError for fewer than 10 rows.
    """
    number = min(1000, max(total // 100, min(100, total // 10)))
    if number == 0:
        raise InputError(
            f"data.source.path: {total} train rows are too few to take validation and test rows "
            "from; use at least 10, or text files (class_path: hlbgpt.data.TextFiles)"
        )
    every = total // number
    drawn: dict[str, list[int]] = {"validation": [], "test": []}
    for start in range(0, number * every, every):
        # By a hash, for rows may repeat themselves with a period.
        one = zlib.crc32(f"validation {start}".encode()) % every
        other = zlib.crc32(f"test {start}".encode()) % (every - 1)
        drawn["validation"].append(start + one)
        drawn["test"].append(start + other + (other >= one))
    return drawn
