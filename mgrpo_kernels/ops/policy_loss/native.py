"""C++ for CPU: one pass over the tokens for loss, gradient and metrics. csrc/cpu/policy_loss.cpp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mgrpo_kernels.backend import native_unsupported as unsupported
from mgrpo_kernels.ops.policy_loss.specs import (
    BASELINES,
    BEHAVIOUR_MODES,
    IMPORTANCE_LEVELS,
    KL_ESTIMATORS,
    LOSS_TYPES,
    SCALES,
    Groups,
    LossOptions,
    Tokens,
)

__all__ = ["forward", "group_advantages", "unsupported"]


def group_advantages(groups: Groups) -> Tensor:
    """Return the advantages ``(B,)``."""
    return torch.ops.mgrpo_native.group_advantages(
        groups.rewards,
        groups.offsets,
        groups.mask,
        BASELINES.index(groups.baseline),
        SCALES.index(groups.scale),
        groups.eps,
    )


def forward(tokens: Tokens, groups: Groups | None, options: LossOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss (0-d), metrics ``(8,)``, d loss / d logprob x normalizer ``(T,)``, and the two factors ``(2,)``."""
    advantages, rollout_mask = tokens.advantages, None
    if groups is not None:
        advantages, rollout_mask = group_advantages(groups), groups.mask
    return torch.ops.mgrpo_native.policy_loss(
        tokens.logprob, tokens.old, advantages, tokens.mask, tokens.offsets, tokens.ref, tokens.entropy, tokens.behaviour,
        tokens.normalizer, tokens.entropy_normalizer, tokens.weights, rollout_mask,
        LOSS_TYPES.index(options.loss_type), IMPORTANCE_LEVELS.index(options.importance_level),
        KL_ESTIMATORS.index(options.kl_estimator), options.kl_bias_correction, BEHAVIOUR_MODES.index(options.behaviour_mode),
        [
            options.clip_low, options.clip_high, math.inf if options.clip_delta is None else options.clip_delta, options.kl_coef,
            options.entropy_coef, options.behaviour_cap, options.cispo_cap, *options.sapo_temperature, *options.vespo_k,
            *options.vespo_lambda, float(options.max_response_tokens or 0),
        ],
    )  # fmt: skip
