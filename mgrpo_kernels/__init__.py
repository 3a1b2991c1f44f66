"""Fused kernels for reinforcement learning on language models, and M-GRPO built from them."""

from mgrpo_kernels.backend import BackendUnavailable, backends, use_backend
from mgrpo_kernels.lm_head import fuse_lm_head
from mgrpo_kernels.momentum import MomentumModel
from mgrpo_kernels.ops.ema import ema_update_
from mgrpo_kernels.ops.iqr_filter import iqr_filter, trajectory_entropy
from mgrpo_kernels.ops.iqr_filter.specs import IqrFilter
from mgrpo_kernels.ops.linear_policy_loss import linear_policy_loss
from mgrpo_kernels.ops.linear_token_stats import linear_token_stats
from mgrpo_kernels.ops.policy_loss import group_advantages, grpo_loss, policy_loss
from mgrpo_kernels.ops.policy_loss.masks import clip_cov_mask, kl_cov_penalty, top_entropy_mask
from mgrpo_kernels.ops.policy_loss.specs import PolicyLoss
from mgrpo_kernels.ops.token_stats import (
    entropy_from_logits,
    logprobs_and_entropy_from_logits,
    logprobs_from_logits,
    token_stats_from_logits,
)
from mgrpo_kernels.ops.token_stats.specs import TokenStats
from mgrpo_kernels.teacher import Teacher
from mgrpo_kernels.vote import Vote, extract_answer, majority_vote

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "IqrFilter",
    "MomentumModel",
    "PolicyLoss",
    "Teacher",
    "TokenStats",
    "Vote",
    "backends",
    "clip_cov_mask",
    "ema_update_",
    "entropy_from_logits",
    "extract_answer",
    "fuse_lm_head",
    "group_advantages",
    "grpo_loss",
    "iqr_filter",
    "kl_cov_penalty",
    "linear_policy_loss",
    "linear_token_stats",
    "logprobs_and_entropy_from_logits",
    "logprobs_from_logits",
    "majority_vote",
    "policy_loss",
    "token_stats_from_logits",
    "top_entropy_mask",
    "trajectory_entropy",
    "use_backend",
]
