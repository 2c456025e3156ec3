"""Plain torch networks; `Network` says what one takes and returns."""

from hlbgpt.models.adaptive import AdaptiveHead
from hlbgpt.models.base import Network
from hlbgpt.models.cache import Cache, causal_attention
from hlbgpt.models.fast import FastGPT
from hlbgpt.models.gpt import GPT
from hlbgpt.models.head import TokenScores, score
from hlbgpt.models.hlb041 import HLB041

__all__ = [
    "GPT",
    "HLB041",
    "AdaptiveHead",
    "Cache",
    "FastGPT",
    "Network",
    "TokenScores",
    "causal_attention",
    "score",
]
