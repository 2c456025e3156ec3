"""Tokenizing: the token files of a split are built where the cache lacks them."""

import hashlib
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich import progress

from hlbgpt.data.encoder import Encoder
from hlbgpt.data.sources import TextSource
from hlbgpt.data.token_file import (
    FORMAT_VERSION,
    HEADER_BYTES,
    DamagedFileError,
    Header,
    TokenFile,
)
from hlbgpt.data.tokenizer import Tokenizer
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import atomic_write, locked


class Part(NamedTuple):
    """A part of a split's text and the token file that belongs to it."""

    path: Path
    source: TextSource


def parts_of(
    cache: Path, source: TextSource, split: str, tokenizer: str, special_tokens: Sequence[str] = ()
) -> list[Part]:
    """Return the parts of a split, with their token files in the folder `cache`.

    A file's name depends on the text of its part, the tokenizer and the format version.
    """
    settings = f"{FORMAT_VERSION}|{tokenizer}|{list(special_tokens)}"
    parts = []
    for part in source.parts(split):
        key = hashlib.sha256(f"{settings}|{_identity(part, split)}".encode()).hexdigest()[:16]
        parts.append(Part(cache / f"{split}-{tokenizer}-{key}.tokens", part))
    return parts


def _identity(source: TextSource, split: str) -> str:
    """Return what identifies a text: the class of its source and the source's fingerprint."""
    return f"{type(source).__module__}.{type(source).__qualname__}:{source.fingerprint(split)}"


def prepare_token_files(
    parts: Sequence[Part], split: str, tokenizer: Callable[[], Tokenizer]
) -> None:
    """Tokenize those parts of `split` whose token files are missing or damaged.

    Existing files are verified. Tokenizing takes bounded memory, uses all CPUs for a long text and
    shows a progress bar. If several processes need the files, one builds them and the others wait.

    Args:
        parts: The parts, whose files are in one folder.
        split: Name of the split.
        tokenizer: Loads the tokenizer; called only if it is needed.

    Raises:
        InputError: The text is empty or cannot be read, or a file cannot be written.
    """
    cache = parts[0].path.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lacking = [part for part in parts if not _is_whole(part.path)]
        if not lacking:
            return
        with locked(cache, wait=False) as free:
            if not free:
                print(f"waiting for another process that builds token files in {cache}")
        with locked(cache, wait=True):
            # Another process may have built the files meanwhile.
            lacking = [part for part in lacking if not _is_whole(part.path, verbose=True)]
            if lacking:
                _build(lacking, split, tokenizer(), may_be_empty=len(parts) > 1)
    except OSError as error:
        raise InputError(
            f"data: {error.filename or cache}: {error.strerror or error}; data.source "
            "must be readable, and data.cache_dir a folder that can be written and has room"
        ) from error


def _is_whole(path: Path, *, verbose: bool = False) -> bool:
    try:
        TokenFile(path).verify()
    except FileNotFoundError:
        return False
    except DamagedFileError as error:
        if verbose:
            print(f"{error}; building it again")
        return False
    return True


def _build(parts: Sequence[Part], split: str, tokenizer: Tokenizer, *, may_be_empty: bool) -> None:
    sizes = [part.source.size(split) for part in parts]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    columns = *progress.Progress.get_default_columns(), progress.TransferSpeedColumn()
    with Encoder(tokenizer) as encoder, progress.Progress(*columns) as bar:
        task = bar.add_task(f"tokenizing {split}", total=total)
        for path, source in parts:
            made_from = _identity(source, split)
            with atomic_write(path) as temporary:
                header = _write(
                    temporary, source, split, encoder, lambda done: bar.advance(task, done)
                )
                if header.tokens == 0 and not may_be_empty:
                    raise InputError(
                        f"data.source: the {split} split is empty; name a file that contains text"
                    )
                if _identity(source, split) != made_from:
                    raise InputError(
                        f"data.source: the {split} split changed while it was tokenized; start "
                        "again once no process is writing to it"
                    )
        bar.update(task, total=bar.tasks[task].completed)


def _write(
    path: Path,
    source: TextSource,
    split: str,
    encoder: Encoder,
    advance: Callable[[int], None],
) -> Header:
    """Write a token file; `advance` is told of the bytes of text that are done."""
    crc = stored = text_bytes = 0
    with path.open("wb") as file:
        file.write(bytes(HEADER_BYTES))
        for encoded, size in encoder.stream(source.chunks(split)):
            file.write(encoded)
            crc = zlib.crc32(encoded, crc)
            stored += len(encoded)
            text_bytes += size
            advance(size)
        tokenizer = encoder.tokenizer
        header = Header(
            str(tokenizer),
            vocab_size=tokenizer.vocab_size,
            dtype=tokenizer.dtype,
            tokens=stored // np.dtype(tokenizer.dtype).itemsize,
            text_bytes=text_bytes,
            crc32=crc,
        )
        file.seek(0)
        file.write(header.to_bytes())
    return header
