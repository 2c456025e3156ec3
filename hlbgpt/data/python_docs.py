"""A text that needs no download: Python's own documentation."""

import ast
import inspect
import platform
import sysconfig
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from hlbgpt.data.sources import SPLITS, TextSource


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
