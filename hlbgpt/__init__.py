"""Train a small GPT on one GPU, fast and measured honestly, with PyTorch Lightning."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["TrainedModel", "fit"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: the command line wants to be quick to start."""
    if name == "fit":
        from hlbgpt.cli.api import fit

        return fit
    if name == "TrainedModel":
        from hlbgpt.generation.pretrained import TrainedModel

        return TrainedModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
