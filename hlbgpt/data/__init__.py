"""From text to batches: text sources, tokenizers, token files, streams, the datamodule."""

from hlbgpt.data.datamodule import TokenDataModule
from hlbgpt.data.text import EmbeddedText, HubText, TextFiles, TextSource

__all__ = ["EmbeddedText", "HubText", "TextFiles", "TextSource", "TokenDataModule"]
