"""Names and inputs that the policy losses share with their backends, tests and benchmarks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mgrpo_kernels.ops.policy_loss.loss_types import LOSS_TYPES, LOSSES
from mgrpo_kernels.ops.policy_loss.options import (
    BEHAVIOUR_MODES,
    IMPORTANCE_LEVELS,
    KL_ESTIMATORS,
    LossOptions,
    check_options,
)

__all__ = [
    "BASELINES",
    "BEHAVIOUR_MODES",
    "IMPORTANCE_LEVELS",
    "KL_ESTIMATORS",
    "LOSSES",
    "LOSS_TYPES",
    "METRICS",
    "SCALES",
    "Groups",
    "LossOptions",
    "PolicyLoss",
    "Tokens",
    "bounds_geometric_mean",
    "check_options",
    "is_token_level",
    "masks_sequences",
    "masks_tokens",
]

METRICS = (
    "tokens",
    "sequences",
    "kl_sum",
    "entropy_sum",
    "ratio_sum",
    "ratio_max",
    "clip_low_count",
    "clip_high_count",
    "masked_count",
)
BASELINES = ("mean", "leave_one_out")
SCALES = ("std", "batch", "none", "mean")


class PolicyLoss(NamedTuple):
    """A policy loss and its metrics."""

    loss: Tensor  # 0-d, differentiable
    metrics: dict[
        str, Tensor
    ]  # 0-d float32, detached: sums and counts (ratio_max: a maximum), so that micro-batches add up


class Tokens(NamedTuple):
    """The tokens of a batch, one sequence after the other; a padded batch is its rows."""

    logprob: Tensor  # (T,)
    old: Tensor | None  # (T,); None: on-policy
    advantages: Tensor | None  # (T,) or (B,); None: from a group's rewards
    mask: Tensor | None  # (T,) bool
    offsets: Tensor  # (B+1,) int64
    ref: Tensor | None  # (T,)
    entropy: Tensor | None  # (T,)
    behaviour: Tensor | None  # (T,)
    normalizer: Tensor | None  # 0-d; None: this batch's own count
    entropy_normalizer: Tensor | None  # 0-d; None: this batch's own tokens
    weights: Tensor | None = None  # (T,) share of each token, where `offsets` do not show whole sequences


class Groups(NamedTuple):
    """Rewards in groups, and how they become advantages."""

    rewards: Tensor  # (B,)
    offsets: Tensor  # (P+1,) int64
    mask: Tensor | None  # (B,) bool
    baseline: str
    scale: str
    eps: float


def is_token_level(options: LossOptions, behaviour: Tensor | None) -> bool:
    """Return whether a token's gradient depends on that token alone, given its share of the loss."""
    per_sequence = LOSSES[options.loss_type].surrogate.per_sequence or options.importance_level == "sequence"
    token_weights = behaviour is None or options.behaviour_mode.startswith("token") or options.behaviour_mode == "none"
    return not per_sequence and token_weights and not masks_sequences(options)


def masks_sequences(options: LossOptions) -> bool:
    """Return whether tokens are masked for what is true of their whole sequence."""
    return options.off_policy_delta is not None or bounds_geometric_mean(options)


def masks_tokens(options: LossOptions) -> bool:
    """Return whether a mask can set the surrogate of a token to 0. A truncated weight that underflows to 0 is no mask."""
    return options.behaviour_mode.endswith("_mask") or masks_sequences(options)


def bounds_geometric_mean(options: LossOptions) -> bool:
    """Return whether sequences are masked by the geometric mean of their behaviour weights."""
    return options.geometric_floor > 0 or options.geometric_cap is not None
