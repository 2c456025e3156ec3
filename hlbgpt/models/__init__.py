"""Plain torch networks; `Network` says what one takes and returns."""

from hlbgpt.models.adaptive_softmax import AdaptiveHead
from hlbgpt.models.base import Network
from hlbgpt.models.fast_gpt import FastGPT
from hlbgpt.models.gpt import GPT
from hlbgpt.models.hlb041 import HLB041
from hlbgpt.models.kv_cache import Cache, causal_attention
from hlbgpt.models.lm_head import TokenScores, score

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
