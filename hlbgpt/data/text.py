"""Text sources: each hands out the train, validation and test text, piece by piece.

A new source is one class with three methods; name it in YAML as `data.source.class_path`.
"""

import ast
import codecs
import inspect
import platform
import sysconfig
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from hlbgpt.errors import InputError

SPLITS = ("train", "validation", "test")

# The commit of the hub's repository from which the official raw files can be restored.
WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"

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


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


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
        return f"file:{_stamp(self.path(split))}"

    def size(self, split: str) -> int:
        return self.path(split).stat().st_size

    def chunks(self, split: str) -> Iterator[str]:
        path, decoder, done = self.path(split), codecs.getincrementaldecoder("utf-8")(), 0
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


class HubText(TextSource):
    """A data set of the Hugging Face hub, or a local folder of parquet files laid out like one.

    The rows are joined to the text file they were made from. WikiText's rows are the lines of
    the official raw files, except that a blank line, `" \\n"` there, is the row `""` here; it is
    put back, so that the text is the official one byte for byte.

    Args:
        path: Name of the data set on the hub, or a local folder.
        name: Configuration of the data set; in a local folder, the sub-folder of that name if
            there is one.
        revision: Commit of the hub's repository, pinned so that the text can never change.
        text_column: Column that holds the text.
    """

    def __init__(
        self,
        path: str = "Salesforce/wikitext",
        name: str | None = "wikitext-103-raw-v1",
        revision: str | None = WIKITEXT_REVISION,
        text_column: str = "text",
    ) -> None:
        self.path, self.name, self.revision, self.text_column = path, name, revision, text_column
        self._loaded: dict[str, Any] = {}

    @cached_property
    def _folder(self) -> Path | None:
        """The local folder with the parquet files, or None if the text is on the hub."""
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            if self.path.startswith((".", "/", "~")):
                raise InputError(f"data.source.path: no folder {self.path!r}")
            return None
        named = folder / self.name if self.name else folder
        return named if named.is_dir() else folder

    def fingerprint(self, split: str) -> str:
        if self._folder is None:
            return f"hub:{self.path}/{self.name}@{self.revision}:{self.text_column}"
        files = sorted(self._folder.rglob("*.parquet"))
        if not files:
            raise InputError(f"data.source.path: no parquet files in {str(self._folder)!r}")
        return f"parquet:{self.text_column}:" + ";".join(map(_stamp, files))

    def _rows(self, split: str) -> Any:
        """The data set of one split, downloaded and prepared by `datasets` (imported only here)."""
        if split in self._loaded:
            return self._loaded[split]
        import datasets

        where = str(self._folder) if self._folder else f"{self.path} ({self.name})"
        try:
            if self._folder is None:
                rows = datasets.load_dataset(
                    self.path, self.name, split=split, revision=self.revision
                )
            else:
                rows = datasets.load_dataset(str(self._folder), split=split)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise InputError(
                f"data.source: cannot load split {split!r} of {where}: {reason}; check the name "
                "and the network, or use text files (class_path: hlbgpt.data.TextFiles)"
            ) from error
        if self.text_column not in rows.column_names:
            raise InputError(
                f"data.source.text_column: {where} has no column {self.text_column!r}, only "
                + ", ".join(rows.column_names)
            )
        self._loaded[split] = rows.select_columns([self.text_column])
        return self._loaded[split]

    def size(self, split: str) -> int:
        return int(self._rows(split).data.nbytes)

    def chunks(self, split: str) -> Iterator[str]:
        for rows in self._rows(split).iter(batch_size=1000):
            yield "".join(row or " \n" for row in rows[self.text_column])


class EmbeddedText(TextSource):
    """The documentation that every Python installation carries: about 2 MB, nothing to download.

    The language reference in `pydoc_data` and the docstrings of the standard library, which are
    parsed from the source files; no module of it is imported. A twentieth of the documents, drawn
    by name, is the validation split, another twentieth the test split. The text differs a little
    from one Python version to the next, so losses on it compare only within a version.
    """

    _SKIPPED = frozenset(
        {"__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data"}
        | {"site-packages", "test", "tests", "turtledemo"}
    )

    def fingerprint(self, split: str) -> str:
        return f"embedded:1:{platform.python_implementation()}:{platform.python_version()}"

    def size(self, split: str) -> int:
        return sum(len(text.encode()) for text in self._documents[split])

    def chunks(self, split: str) -> Iterator[str]:
        yield from self._documents[split]

    @cached_property
    def _documents(self) -> dict[str, list[str]]:
        documents: dict[str, list[str]] = {split: [] for split in SPLITS}
        for name, text in self._named_documents():
            # By name, so that a document stays in its split when others come or go.
            drawn = zlib.crc32(name.encode()) % 20
            split = {0: "validation", 1: "test"}.get(drawn, "train")
            documents[split].append(f"= {name} =\n\n{text.strip()}\n\n")
        return documents

    def _named_documents(self) -> Iterator[tuple[str, str]]:
        from pydoc_data.topics import topics

        yield from sorted(topics.items())
        root = Path(sysconfig.get_path("stdlib"))
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if not self._SKIPPED.intersection(relative.parts):
                name = ".".join(relative.with_suffix("").parts)
                if text := "\n\n".join(_docstrings(path)):
                    yield name, text


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a Python file in the order of the source, without running it."""
    owners = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    pending: list[ast.AST] = [ast.parse(path.read_bytes())]
    while pending:
        node = pending.pop()
        if isinstance(node, owners):
            if doc := ast.get_docstring(node):
                heading = "" if isinstance(node, ast.Module) else f"{node.name}: "
                yield heading + inspect.cleandoc(doc)
            # Definitions stand in bodies, so expressions, most of the tree, need no visit.
            pending.extend(reversed(node.body))
