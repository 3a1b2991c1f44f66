"""Fused kernels for reinforcement learning on language models, and M-GRPO built from them."""

from mgrpo_kernels.backend import BackendUnavailable, backends, use_backend
from mgrpo_kernels.ops.linear_token_stats import linear_token_stats
from mgrpo_kernels.ops.token_stats import (
    entropy_from_logits,
    logprobs_and_entropy_from_logits,
    logprobs_from_logits,
    token_stats_from_logits,
)
from mgrpo_kernels.ops.token_stats.specs import TokenStats

__all__ = [
    "BackendUnavailable",
    "TokenStats",
    "backends",
    "entropy_from_logits",
    "linear_token_stats",
    "logprobs_and_entropy_from_logits",
    "logprobs_from_logits",
    "token_stats_from_logits",
    "use_backend",
]
