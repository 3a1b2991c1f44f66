"""Triton for GPUs: advantages, loss, gradient and metrics in one kernel, a program for each sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels.backend import triton_unsupported as unsupported
from mgrpo_kernels.ops._triton.launch import launch
from mgrpo_kernels.ops.policy_loss.loss_types import LOSSES, SEQUENCE_MEAN
from mgrpo_kernels.ops.policy_loss.options import scalars
from mgrpo_kernels.ops.policy_loss.specs import BASELINES, METRICS, SCALES, Groups, LossOptions, Tokens, masks_sequences

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
        kernels.advantages_kernel,
        (batch,),
        advantages,
        **_group_arguments(groups),
        advantages=advantages,
        batch=batch,
        BLOCK=block,
        num_warps=num_warps,
    )
    return advantages


def forward(tokens: Tokens, groups: Groups | None, options: LossOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss (0-d), metrics ``(9,)``, d loss / d logprob x normalizer ``(T,)``, and the two factors ``(2,)``."""
    from mgrpo_kernels.ops.policy_loss import _triton_kernels as kernels

    number, batch = tokens.logprob.shape[0], tokens.offsets.shape[0] - 1
    like = torch.empty(0, dtype=torch.float32, device=tokens.logprob.device)
    loss, metrics, gradient, scales = (
        like.new_empty(()),
        like.new_empty(len(METRICS)),
        like.new_empty(number),
        like.new_empty(2),
    )
    per_token = tokens.advantages is not None and tokens.advantages.shape[0] == number != batch
    block, num_warps = _LONG if number > _LONG_FROM * batch else _SHORT
    inputs: dict[str, Any] = {name: _contiguous(values) for name, values in tokens._asdict().items()}
    # Nothing has checked their values on a GPU, and in the kernel the bounds would take up to 15 registers.
    inputs["offsets"] = tokens.offsets.clamp(0, number)
    if batch == 0:  # no rollout has a group
        groups, inputs["advantages"] = None, like
    numbers: dict[str, Any] = dict(scalars(options))
    # The bounds themselves: working them out in the kernel takes registers.
    middle = 0.0 if LOSSES[options.loss_type].surrogate.geometric_mean else 1.0  # of log ratios, or of ratios
    numbers["lower"], numbers["upper"] = middle - numbers.pop("clip_low"), middle + numbers.pop("clip_high")
    launch(
        kernels.loss_kernel,
        (max(1, batch),),
        like,
        **inputs | {"mask": _bytes(tokens.mask)},
        **_group_arguments(groups),
        loss=loss,
        metrics=metrics,
        gradient=gradient,
        scales=scales,
        partial=like.new_empty(1 + len(METRICS), batch),
        counter=torch.zeros(1, dtype=torch.int32, device=like.device),  # how many programs are done
        batch=batch,
        **numbers,
        **_constants(options, behaviour=tokens.behaviour is not None),
        PER_TOKEN=per_token,
        BLOCK=block,
        num_warps=num_warps,
    )
    return loss, metrics, gradient, scales


def _group_arguments(groups: Groups | None) -> dict[str, Any]:
    """Return the kernel's arguments about groups; without any, the compiled kernel reads none of them."""
    if groups is None:
        tensors = dict.fromkeys(("rewards", "group_offsets", "rollout_mask"))
        return tensors | {"groups": 0, "eps": 0.0, "BASELINE": BASELINES[0], "SCALE": SCALES[0]}
    return {
        "rewards": groups.rewards.contiguous(),
        "group_offsets": groups.offsets.clamp(0, groups.rewards.shape[0]),
        "rollout_mask": _bytes(groups.mask),
        "groups": groups.offsets.shape[0] - 1,
        "eps": float(groups.eps),
        "BASELINE": groups.baseline,
        "SCALE": groups.scale,
    }


def _constants(options: LossOptions, *, behaviour: bool) -> dict[str, Any]:
    """Return what the kernel is compiled for."""
    loss = LOSSES[options.loss_type]
    level, _, bound = options.behaviour_mode.partition("_")
    return {
        "SURROGATE": loss.surrogate.name,
        "SEQUENCE_MEAN": loss.share == SEQUENCE_MEAN,
        "COUNTS": loss.counts,
        "BY_SEQUENCE": options.importance_level == "sequence" or loss.surrogate.geometric_mean,
        "KL_ESTIMATOR": options.kl_estimator,
        "KL_BIAS_CORRECTION": options.kl_bias_correction,
        "BEHAVIOUR": level if behaviour else "none",
        "TRUNCATE": bound == "truncate",
        "MASKS": masks_sequences(options),
        "HAS_DELTA": options.clip_delta is not None,
    }


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)
