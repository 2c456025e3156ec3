"""Train a small GPT on one GPU, fast and measured honestly, with PyTorch Lightning."""

__version__ = "0.1.0"
