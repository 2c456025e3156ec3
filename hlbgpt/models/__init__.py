"""Plain torch networks; `Network` says what one takes and returns."""

from hlbgpt.models.base import Network
from hlbgpt.models.gpt import GPT
from hlbgpt.models.head import TokenScores, score

__all__ = ["GPT", "Network", "TokenScores", "score"]
