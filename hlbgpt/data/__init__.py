"""From text to batches: text sources, tokenizers, token files, streams, the datamodule."""

from hlbgpt.data.datamodule import TokenDataModule
from hlbgpt.data.embedded import EmbeddedText
from hlbgpt.data.text import HubText, TextFiles, TextSource
from hlbgpt.data.textfolder import TextFolder

__all__ = [
    "EmbeddedText",
    "HubText",
    "TextFiles",
    "TextFolder",
    "TextSource",
    "TokenDataModule",
]
