"""From text to batches: text sources, tokenizers, token files, streams, the datamodule."""

from hlbgpt.data.datamodule import TokenDataModule
from hlbgpt.data.python_docs import EmbeddedText
from hlbgpt.data.sources import HubText, TextFiles, TextSource
from hlbgpt.data.text_folder import TextFolder

__all__ = [
    "EmbeddedText",
    "HubText",
    "TextFiles",
    "TextFolder",
    "TextSource",
    "TokenDataModule",
]
