"""Text that needs no download: Python's own documentation."""

import ast
import inspect
import platform
import sysconfig
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from hlbgpt.data.sources import SPLITS, TextSource


class PythonDocs(TextSource):
    """About 2 MB of documentation that comes with every Python installation.

    It consists of the language reference in `pydoc_data` and the docstrings of the standard
    library, which are parsed from the source files without importing them. A hash of a document's
    name decides its split: one in 20 is for validation, another for test. The text differs a
    little between Python versions, so losses can only be compared within one version.
    """

    _SKIPPED = frozenset(
        {"__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data"}
        | {"site-packages", "test", "tests", "turtledemo"}
    )

    def fingerprint(self, split: str) -> str:
        return f"{platform.python_implementation()} {platform.python_version()}"

    def size(self, split: str) -> int:
        return sum(len(text.encode()) for text in self._documents[split])

    def chunks(self, split: str) -> Iterator[str]:
        yield from self._documents[split]

    @cached_property
    def _documents(self) -> dict[str, list[str]]:
        documents: dict[str, list[str]] = {split: [] for split in SPLITS}
        for name, text in self._named_documents():
            # By name, so that documents keep their split when others are added or removed.
            split = {0: "validation", 1: "test"}.get(zlib.crc32(name.encode()) % 20, "train")
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
    """Yield the docstrings of a Python file in source order, without running the file."""
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    pending: list[ast.AST] = [ast.parse(path.read_bytes())]
    while pending:
        node = pending.pop()
        if isinstance(node, documented):
            if doc := ast.get_docstring(node):
                heading = "" if isinstance(node, ast.Module) else f"{node.name}: "
                yield heading + inspect.cleandoc(doc)
            # Definitions are found in bodies only, so expressions need not be searched.
            pending.extend(reversed(node.body))
