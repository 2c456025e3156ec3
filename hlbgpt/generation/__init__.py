"""Sampling, the streaming detokenizer, and pretrained networks loaded from files."""

from hlbgpt.generation.detokenizer import StreamingDetokenizer
from hlbgpt.generation.pretrained import PretrainedModel
from hlbgpt.generation.sampling import SamplingConfig, continue_prompts, generate, top_k_top_p

__all__ = [
    "PretrainedModel",
    "SamplingConfig",
    "StreamingDetokenizer",
    "continue_prompts",
    "generate",
    "top_k_top_p",
]
