"""C++ for CPU: one pass over the tokens for loss, gradient and metrics. csrc/cpu/policy_loss.cpp."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels.backend import native_unsupported as unsupported
from mgrpo_kernels.ops.policy_loss.options import scalars
from mgrpo_kernels.ops.policy_loss.specs import BASELINES, LOSSES, SCALES, Groups, LossOptions, Tokens, masks_sequences

__all__ = ["forward", "group_advantages", "unsupported"]


def group_advantages(groups: Groups) -> Tensor:
    """Return the advantages ``(B,)``."""
    advantages: Tensor = torch.ops.mgrpo_native.group_advantages(
        groups.rewards.float(),
        groups.offsets,
        groups.mask,
        BASELINES.index(groups.baseline),
        SCALES.index(groups.scale),
        groups.eps,
    )
    return advantages


def forward(tokens: Tokens, groups: Groups | None, options: LossOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss (0-d), metrics ``(9,)``, d loss / d logprob x normalizer ``(T,)``, and the two factors ``(2,)``."""
    advantages, rollout_mask = tokens.advantages, None
    if groups is not None:
        advantages, rollout_mask = group_advantages(groups), groups.mask
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.mgrpo_native.policy_loss(
        **(tokens._asdict() | {"advantages": advantages}), rollout_mask=rollout_mask, **_settings(options)
    )
    return outputs


@functools.lru_cache(maxsize=64)
def _settings(options: LossOptions) -> dict[str, dict[str, Any]]:
    """Return the options and the loss type's row of the table, as the kernel takes them."""
    loss = LOSSES[options.loss_type]
    names = {
        "surrogate": loss.surrogate.name,
        "share": loss.share,
        "counts": loss.counts,
        "importance_level": options.importance_level,
        "kl_estimator": options.kl_estimator,
        "behaviour_mode": options.behaviour_mode,
    }
    flags = {
        "kl_bias_correction": options.kl_bias_correction,
        "per_sequence": loss.surrogate.per_sequence,
        "geometric_mean": loss.surrogate.geometric_mean,
        "masks_sequences": masks_sequences(options),
    }
    return {"names": names, "numbers": scalars(options), "flags": flags}
