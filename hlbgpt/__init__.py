"""Train a small GPT on one GPU, fast and measured honestly, with PyTorch Lightning."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["LanguageModule", "PretrainedModel", "TimeToTarget", "TokenDataModule", "fit"]

_MODULES = {
    "LanguageModule": "hlbgpt.training.module",
    "PretrainedModel": "hlbgpt.generation.pretrained",
    "TimeToTarget": "hlbgpt.callbacks.time_to_target",
    "TokenDataModule": "hlbgpt.data.datamodule",
    "fit": "hlbgpt.cli.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the command line starts quickly."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
