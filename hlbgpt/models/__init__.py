"""Plain torch networks.

A network takes `tokens` (B, T) int64 and `targets` (B, T) int64 or None. Without targets it returns
logits (B, T, V); with targets the mean loss; with `per_token=True` a `TokenScores`. It may say its
limits in `vocab_size` and `max_sequence_length`. Repeated blocks live in `blocks`, which is how the
optimizer's parameter groups find the matrices (`hlbgpt.optim`).
"""

from hlbgpt.models.gpt import GPT
from hlbgpt.models.head import TokenScores, score

__all__ = ["GPT", "TokenScores", "score"]
