"""Text from the Hugging Face hub."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

from hlbgpt.data.sources import SPLIT_PERIOD, SPLITS, TextSource, drawn_split, file_stamps
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import expand_path

WIKITEXT, WIKITEXT_NAME = "Salesforce/wikitext", "wikitext-103-raw-v1"
# The commit of the hub's repository from which the official raw files can be restored.
WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"

_VALIDATION_NAMES = ("val", "valid", "dev")
_ROWS_AT_ONCE = 256


class HubText(TextSource):
    """A data set of the Hugging Face hub, or a local folder with its parquet files.

    The rows of WikiText are the lines of the official raw files. Its blank lines, `" \\n"` in the
    files, are empty rows on the hub and are restored, so the text equals the files byte for byte.
    WikiText is recognized by its path `Salesforce/wikitext` or by a local folder named like one
    of its configurations. In any other data set a row is a document, followed by a blank line.

    A split called val, valid or dev is used as the validation split. If a data set of documents
    has no validation or no test split, one in 20 rows of its train split is used instead, or about
    1000 rows if that is fewer, and a printed line says so.

    Args:
        path: Name of the data set on the hub, or a local folder.
        name: Configuration of the data set; for a local folder, a sub-folder. The default is the
            only configuration, and `wikitext-103-raw-v1` for WikiText.
        revision: Commit of the hub's repository, so that the text never changes. The default is
            the newest when the text is first tokenized, and a fixed one for WikiText.
        text_column: Column that holds the text.
        rows: Whether a row is one of the `lines` of a text or one of many `documents`. The
            default is `lines` for WikiText and `documents` otherwise.
    """

    def __init__(
        self,
        path: str = WIKITEXT,
        name: str | None = None,
        revision: str | None = None,
        text_column: str = "text",
        rows: Literal["lines", "documents"] | None = None,
    ) -> None:
        self.path, self.text_column = path, text_column
        on_hub = path == WIKITEXT
        self.name = WIKITEXT_NAME if name is None and on_hub else name
        self.revision = WIKITEXT_REVISION if revision is None and on_hub else revision
        local = expand_path(path, "data.source.path")
        folders = (local / (self.name or WIKITEXT_NAME), local)
        self._folder = next((folder for folder in folders if folder.is_dir()), None)
        self._label = str(self._folder or (f"{path} ({self.name})" if self.name else path))
        is_wikitext = on_hub or (self._folder and self._folder.name.startswith("wikitext-"))
        self.rows = rows or ("lines" if is_wikitext else "documents")

    def fingerprint(self, split: str) -> str:
        if self._folder is None:
            text = f"{self.path}/{self.name}@{self.revision}"
        else:
            text = file_stamps(sorted(path for path in self._folder.rglob("*") if path.is_file()))
        return f"{text}:{self.text_column}:{self.rows}"

    @cached_property
    def _splits(self) -> dict[str, Any]:
        """All splits, downloaded and prepared by `datasets` (imported only here)."""
        import datasets

        try:
            if self._folder is None:
                loaded = datasets.load_dataset(self.path, self.name, revision=self.revision)
            else:
                loaded = datasets.load_dataset(str(self._folder))
        # `datasets` raises RuntimeError for a data set that needs to run code of its own.
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split()) or repr(error)
            raise InputError(
                f"data.source: cannot load {self._label}: {reason:.400}; check path, name and the "
                "network, or use text files (class_path: hlbgpt.data.TextFiles)"
            ) from error
        splits = {
            "validation" if name in _VALIDATION_NAMES else name: self._text_of(rows)
            for name, rows in loaded.items()
        }
        return splits if self.rows == "lines" else self._with_drawn_splits(splits)

    def _text_of(self, rows: Any) -> Any:
        """Drop all columns but the text."""
        kinds = {name: getattr(kind, "dtype", kind) for name, kind in rows.features.items()}
        if kinds.get(self.text_column) not in ("string", "large_string"):
            found = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            raise InputError(
                f"data.source.text_column: {self._label} has no text column "
                f"{self.text_column!r}; its columns are {found}"
            )
        return rows.select_columns([self.text_column])

    def _with_drawn_splits(self, splits: dict[str, Any]) -> dict[str, Any]:
        """Make the splits that the data set lacks out of its train split."""
        lacking = [split for split in SPLITS if split not in splits]
        if not lacking or "train" in lacking:
            return splits
        total = len(splits["train"])
        rows: dict[str, list[int]] = {split: [] for split in ("train", *lacking)}
        for row in range(total):
            split = drawn_split(row, max(SPLIT_PERIOD, total // 1000))
            rows[split if split in lacking else "train"].append(row)
        for split in lacking:
            print(
                f"{self._label} has no {split} split: {len(rows[split])} of its {total} train "
                "rows are used instead"
            )
        return splits | {split: splits["train"].select(rows[split]) for split in rows}

    def _rows(self, split: str) -> Any:
        if split not in self._splits:
            raise InputError(
                f"data.source.path: {self._label} has no {split} split, only "
                f"{', '.join(self._splits)}; use another data set, or text files (class_path: "
                "hlbgpt.data.TextFiles)"
            )
        return self._splits[split]

    def size(self, split: str) -> int:
        rows = self._rows(split)
        # `data` is the whole table, of which a drawn split has only some rows.
        return rows.data.nbytes * len(rows) // max(1, rows.data.num_rows)

    def chunks(self, split: str) -> Iterator[str]:
        for batch in self._rows(split).iter(batch_size=_ROWS_AT_ONCE):
            texts = batch[self.text_column]
            if self.rows == "lines":
                yield "".join(text or " \n" for text in texts)
            else:
                stripped = (text.strip("\n") for text in texts if text)
                yield "".join(f"{text}\n\n" for text in stripped if text)
