"""Networks in plain torch; `Network` defines what a network takes and returns."""

from hlbgpt.models.adaptive_softmax import AdaptiveSoftmax
from hlbgpt.models.base import Network, checkpoint_blocks, token_scores
from hlbgpt.models.fast_gpt import FastGPT
from hlbgpt.models.gpt import GPT
from hlbgpt.models.hlb041 import HLB041
from hlbgpt.models.kv_cache import KVCache, causal_attention
from hlbgpt.models.lm_head import TokenScores, score

__all__ = [
    "GPT",
    "HLB041",
    "AdaptiveSoftmax",
    "FastGPT",
    "KVCache",
    "Network",
    "TokenScores",
    "causal_attention",
    "checkpoint_blocks",
    "score",
    "token_scores",
]
