"""Checks of what the public functions are given. They return records of flat tensors, which nothing checks again."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels import checks, sequences
from mgrpo_kernels.ops._statistics import statistics_dtype
from mgrpo_kernels.ops.policy_loss.loss_types import SEQUENCE_LENGTHS
from mgrpo_kernels.ops.policy_loss.options import LossForm, LossOptions
from mgrpo_kernels.ops.policy_loss.specs import BASELINES, LOSSES, SCALES, Groups, Tokens, bounds_geometric_mean


def check_tokens(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    behaviour_logprobs: Tensor | None,
    normalizer: float | Tensor | None,
    entropy_normalizer: float | Tensor | None,
    options: LossOptions,
    *,
    name: str = "logprobs",
) -> Tokens:
    """Check per-token inputs against each other and return them flat, advantages still missing. `name` is what errors call `logprobs`."""
    checks.check_tensor(name, logprobs)
    offsets = sequences.sequence_offsets(name, logprobs, cu_seqlens)
    rows = logprobs.shape
    mask = checks.check_mask("mask", mask, rows, logprobs.device)
    of_tokens = {
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "entropy": entropy,
        "behaviour_logprobs": behaviour_logprobs,
    }
    for argument, values in of_tokens.items():
        if values is not None:
            checks.check_tensor(argument, values, shape=rows, device=logprobs.device)
    if options.kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: expected a tensor with kl_coef {options.kl_coef}, got None")
    if options.entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy: expected a tensor with entropy_coef {options.entropy_coef}, got None")
    if bounds_geometric_mean(options) and behaviour_logprobs is None:
        raise ValueError("behaviour_logprobs: expected a tensor with geometric_cap or geometric_floor, got None")
    loss, name = LOSSES[options.loss_type], options.loss_type
    if loss.counts == SEQUENCE_LENGTHS and options.max_response_tokens is None and normalizer is None:
        raise ValueError(f"max_response_tokens: expected an int with loss_type {name!r} and no normalizer, got None")
    if behaviour_logprobs is not None:
        check_behaviour_mode(options)

    def flat(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.reshape(-1)

    return Tokens(
        logprob=logprobs.reshape(-1),
        old=flat(old_logprobs),
        advantages=None,
        mask=flat(mask),
        offsets=offsets,
        ref=flat(ref_logprobs),
        entropy=flat(entropy),
        behaviour=flat(behaviour_logprobs),
        normalizer=_count("normalizer", normalizer, logprobs),
        entropy_normalizer=_count("entropy_normalizer", entropy_normalizer, logprobs),
    )


def check_behaviour_mode(options: LossForm) -> None:
    """Raise ValueError for a weight of whole sequences with a loss that has such a weight of its own."""
    of_sequences = options.behaviour_mode.startswith(("sequence", "geometric"))
    if LOSSES[options.loss_type].surrogate.weighs_behaviour and of_sequences:
        raise ValueError(
            f"behaviour_mode: expected token_truncate, token_mask or none with loss_type {options.loss_type!r}, "
            f"got {options.behaviour_mode!r}"
        )


def _count(name: str, value: float | Tensor | None, like: Tensor) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        checks.check_tensor(name, value, dtypes=checks.FLOATS + checks.INTS, dim=0, device=like.device)
        if value.requires_grad:
            raise ValueError(f"{name}: expected a tensor without requires_grad, got one that requires grad")
        return value.to(statistics_dtype(like))
    checks.check_number(name, value, above=0.0)
    return torch.full((), value, dtype=statistics_dtype(like), device=like.device)


def flat_advantages(advantages: Tensor, logprobs: Tensor, tokens: Tokens) -> Tensor:
    """Return advantages flat, ``(B,)`` or ``(T,)``."""
    checks.check_tensor("advantages", advantages, device=logprobs.device)
    number = tokens.offsets.shape[0] - 1
    if advantages.shape not in (logprobs.shape, (number,)):
        raise ValueError(
            f"advantages: expected shape ({number},) or {checks.shape_text(logprobs.shape)}, got {checks.shape_text(advantages.shape)}"
        )
    return advantages.reshape(-1)


def check_groups(
    rewards: Tensor, groups: int | Tensor, mask: Tensor | None, mask_name: str, baseline: str, scale: str, eps: float
) -> Groups:
    """Check rewards and groups against each other and return them; `mask_name` is what errors call `mask`."""
    checks.check_tensor("rewards", rewards, dim=1)
    checks.check_choice("baseline", baseline, BASELINES)
    checks.check_choice("scale", scale, SCALES)
    checks.check_number("eps", eps, at_least=0.0)
    mask = checks.check_mask(mask_name, mask, rewards.shape, rewards.device)
    offsets = sequences.group_offsets(groups, rewards.shape[0], rewards.device)
    return Groups(rewards.detach().to(statistics_dtype(rewards)), offsets, mask, baseline, scale, float(eps))
