"""Triton for GPUs: advantages, loss, gradient and metrics in one launch, a program for each sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mgrpo_kernels.backend import triton_unsupported as unsupported
from mgrpo_kernels.ops._triton.launch import launch
from mgrpo_kernels.ops.policy_loss.specs import (
    BASELINES,
    CLIPPED,
    COUNT_SEQUENCES,
    METRICS,
    SCALES,
    SEQUENCE_MEANS,
    Groups,
    LossOptions,
    Tokens,
)

__all__ = ["forward", "group_advantages", "unsupported"]

_LONG, _SHORT = (512, 8), (128, 1)  # tokens a program takes at once, and its warps
_LONG_FROM = 128  # tokens of a sequence, on average


def group_advantages(groups: Groups) -> Tensor:
    """Return the advantages ``(B,)``."""
    advantages = torch.empty_like(groups.rewards, memory_format=torch.contiguous_format)
    batch = advantages.shape[0]
    if batch == 0:
        return advantages
    from mgrpo_kernels.ops.policy_loss import _triton_kernels as kernels

    block, num_warps = _SHORT
    launch(
        kernels.advantages_kernel, (batch,), advantages,
        groups.rewards.contiguous(), groups.offsets.contiguous(), _bytes(groups.mask), advantages,
        batch, groups.offsets.shape[0] - 1, float(groups.eps),
        BASELINE=groups.baseline, SCALE=groups.scale, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
    return advantages


def forward(tokens: Tokens, groups: Groups | None, options: LossOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss (0-d), metrics ``(8,)``, d loss / d logprob x normalizer ``(T,)``, and the two factors ``(2,)``."""
    from mgrpo_kernels.ops.policy_loss import _triton_kernels as kernels

    number, batch = tokens.logprob.shape[0], tokens.offsets.shape[0] - 1
    like = torch.empty(0, dtype=torch.float32, device=tokens.logprob.device)
    loss, metrics, gradient, scales = (
        like.new_empty(()),
        like.new_empty(len(METRICS)),
        like.new_empty(number),
        like.new_empty(2),
    )
    partial = like.new_empty(1 + len(METRICS), batch)
    counter = torch.zeros(1, dtype=torch.int32, device=like.device)  # how many programs are done
    per_token = tokens.advantages is not None and tokens.advantages.shape[0] == number != batch
    block, num_warps = _LONG if number > _LONG_FROM * batch else _SHORT
    delta = math.inf if options.clip_delta is None else options.clip_delta
    launch(
        kernels.loss_kernel, (max(1, batch),), like,
        *map(_contiguous, (tokens.logprob, tokens.old, tokens.advantages)), _bytes(tokens.mask), tokens.offsets.contiguous(),
        *map(_contiguous, (tokens.ref, tokens.entropy, tokens.behaviour, tokens.normalizer, tokens.entropy_normalizer)),
        _contiguous(tokens.weights),
        None if groups is None else groups.rewards.contiguous(), None if groups is None else groups.offsets.contiguous(),
        None if groups is None else _bytes(groups.mask),
        loss, metrics, gradient, scales, partial, counter,
        batch, 0 if groups is None else groups.offsets.shape[0] - 1,
        *map(float, (
            0.0 if groups is None else groups.eps, 1.0 - options.clip_low, 1.0 + options.clip_high, delta, options.kl_coef,
            options.entropy_coef, options.behaviour_cap, options.cispo_cap, *options.sapo_temperature, *options.vespo_k,
            *options.vespo_lambda, options.max_response_tokens or 0,
        )),
        BASELINE=BASELINES[0] if groups is None else groups.baseline, SCALE=SCALES[0] if groups is None else groups.scale,
        KIND="clip" if options.loss_type in CLIPPED else options.loss_type, MEANS=options.loss_type in SEQUENCE_MEANS,
        COUNTS=_counts(options), BY_SEQUENCE=options.importance_level == "sequence", PER_TOKEN=per_token,
        ESTIMATOR=options.kl_estimator, BIAS_CORRECTION=options.kl_bias_correction,
        TRUNCATE=options.behaviour_mode.endswith("truncate"),
        BEHAVIOUR_BY_SEQUENCE=tokens.behaviour is not None and options.behaviour_mode.startswith("sequence"),
        HAS_DELTA=options.clip_delta is not None, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
    return loss, metrics, gradient, scales


def _counts(options: LossOptions) -> str:
    """Return what the normalizer counts."""
    if options.loss_type in COUNT_SEQUENCES:
        return "sequences"
    return "length" if options.loss_type == "dr_grpo" else "tokens"


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)
