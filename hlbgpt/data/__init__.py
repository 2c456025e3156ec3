"""From text to batches: text sources, tokenizers, token files, streams, the datamodule."""

from hlbgpt.data.datamodule import TokenDataModule
from hlbgpt.data.hub import HubText
from hlbgpt.data.loaders import EvalLoader, TrainLoader
from hlbgpt.data.python_docs import PythonDocs
from hlbgpt.data.sources import TextFiles, TextSource
from hlbgpt.data.step_loader import StepLoader
from hlbgpt.data.text_folder import TextFolder

__all__ = [
    "EvalLoader",
    "HubText",
    "PythonDocs",
    "StepLoader",
    "TextFiles",
    "TextFolder",
    "TextSource",
    "TokenDataModule",
    "TrainLoader",
]
