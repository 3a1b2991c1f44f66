"""The definition, in plain PyTorch: what every other backend is held to. The gradient is written out; tests hold it to autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import sequences
from mgrpo_kernels.backend import reference_unsupported as unsupported
from mgrpo_kernels.ops.policy_loss.specs import CLIPPED, COUNT_SEQUENCES, SEQUENCE_MEANS, Groups, LossOptions, Tokens
from mgrpo_kernels.sequences import segment_reduce

__all__ = ["forward", "group_advantages", "own_normalizer", "token_weights", "unsupported"]


def group_advantages(groups: Groups) -> Tensor:
    """Return the advantages ``(B,)``, in the rewards' dtype."""
    rewards, offsets = groups.rewards, groups.offsets
    group = sequences.group_index(offsets, rewards.shape[0])
    keep = torch.ones_like(rewards, dtype=torch.bool) if groups.mask is None else groups.mask
    kept = torch.where(keep, rewards, 0.0)
    count = segment_reduce(keep.to(rewards.dtype), offsets)
    total = segment_reduce(kept, offsets)
    mean = (total / count.clamp(min=1))[group]
    if groups.baseline == "leave_one_out":
        centred = kept - (total[group] - kept) / (count[group] - 1).clamp(min=1)
    else:
        centred = kept - mean
    if groups.scale == "std":
        variance = segment_reduce(torch.where(keep, kept - mean, 0.0).square(), offsets) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt()[group] + groups.eps)
    elif groups.scale == "batch":
        number = count.sum()
        spread = torch.where(keep, kept - kept.sum() / number.clamp(min=1), 0.0)
        centred = centred / ((spread.square().sum() / (number - 1).clamp(min=1)).sqrt() + groups.eps)
    # Equal rewards teach nothing; the mean's rounding must not make them look different.
    highest = segment_reduce(torch.where(keep, kept, -torch.inf), offsets, "max")
    lowest = segment_reduce(torch.where(keep, kept, torch.inf), offsets, "min")
    silent = (count < 2) | (highest == lowest)
    return torch.where(keep & ~silent[group], centred, 0.0)


def token_weights(mask: Tensor, offsets: Tensor, options: LossOptions, dtype: torch.dtype) -> Tensor:
    """Return each token's share of the loss ``(T,)`` before the normalizer: 1 / length in means over sequences, else 1; 0 if masked."""
    share = mask.to(dtype)
    if options.loss_type in SEQUENCE_MEANS:
        share = share / segment_reduce(share, offsets).clamp(min=1)[sequences.group_index(offsets, mask.shape[0])]
    return share


def forward(tokens: Tokens, groups: Groups | None, options: LossOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss (0-d), metrics ``(8,)``, d loss / d logprob x normalizer ``(T,)``, and ``(2,)``: 1 / normalizer, entropy_coef / its own.

    All in float32 (float64 for float64 log-probs). Gradients are left undivided so that a kernel can write them in its only pass.
    """
    dtype = torch.float64 if tokens.logprob.dtype == torch.float64 else torch.float32
    offsets, number = tokens.offsets, tokens.offsets.shape[0] - 1
    sequence = sequences.group_index(offsets, tokens.logprob.shape[0])  # (T,)
    mask = torch.ones_like(tokens.logprob, dtype=torch.bool) if tokens.mask is None else tokens.mask
    count = torch.full((), number, dtype=dtype, device=mask.device)
    advantages = tokens.advantages
    if groups is not None:
        advantages = group_advantages(groups)
        if groups.mask is not None:
            mask = mask & groups.mask[sequence]
            count = groups.mask.sum().to(dtype)
    assert advantages is not None
    if advantages.shape != mask.shape or offsets.shape[0] == advantages.shape[0] + 1:
        advantages = advantages[sequence]

    def clean(values: Tensor) -> Tensor:  # what a masked position holds is never read
        return torch.where(mask, values.to(dtype), 0.0)

    logprob, advantage = clean(tokens.logprob), clean(advantages)
    old = logprob if tokens.old is None else clean(tokens.old)
    log_ratio = logprob - old
    lengths = segment_reduce(mask.to(dtype), offsets).clamp(min=1)  # (B,)
    by_sequence = options.importance_level == "sequence"
    log_weight = (segment_reduce(log_ratio, offsets) / lengths)[sequence] if by_sequence else log_ratio
    ratio = log_weight.exp()
    behaviour = _behaviour_weight(tokens, clean, old, mask, sequence, options)

    term = _policy_term(logprob, log_ratio, ratio, advantage, behaviour, mask, tokens, sequence, options)
    if behaviour is not None and options.loss_type != "vespo":
        term = _Term(*(part * behaviour for part in term))
    kl = torch.zeros_like(logprob)
    if tokens.ref is not None:
        kl, kl_slope = _kl(clean(tokens.ref) - logprob, options.kl_estimator)
        penalty = _Term(kl, kl_slope, torch.zeros_like(kl))
        if options.kl_bias_correction:
            penalty = _Term(kl * ratio, kl_slope * ratio, kl * ratio)
            kl = penalty.value
        term = _Term(*(part + options.kl_coef * extra for part, extra in zip(term, penalty, strict=True)))

    share = token_weights(mask, offsets, options, dtype) if tokens.weights is None else tokens.weights
    through_ratio = share * term.by_log_weight
    if by_sequence:  # d log_weight / d logprob = 1 / length, for every token of the sequence
        through_ratio = (segment_reduce(through_ratio, offsets) / lengths)[sequence]
    gradient = torch.where(mask, share * term.by_logprob + through_ratio, 0.0)

    entropy = torch.zeros_like(logprob) if tokens.entropy is None else clean(tokens.entropy)
    number_of_tokens = mask.sum().to(dtype)
    normalizer = _or_one(
        own_normalizer(number_of_tokens, count, options) if tokens.normalizer is None else tokens.normalizer
    )
    entropy_normalizer = _or_one(number_of_tokens if tokens.entropy_normalizer is None else tokens.entropy_normalizer)
    scales = torch.stack([1.0 / normalizer.to(dtype), options.entropy_coef / entropy_normalizer.to(dtype)])
    loss = (share * torch.where(mask, term.value, 0.0)).sum() * scales[0] - entropy.sum() * scales[1]

    limit_low, limit_high = 1.0 - options.clip_low, 1.0 + options.clip_high
    seen = ratio if options.clip_delta is None else ratio.clamp(max=options.clip_delta)
    clip_low = mask & (options.loss_type in CLIPPED) & (seen < limit_low) & (advantage < 0)
    clip_high = mask & (options.loss_type in CLIPPED) & (seen > limit_high) & (advantage > 0)
    if options.loss_type == "cispo":
        clip_high = mask & (ratio > options.cispo_cap) & (advantage > 0)
    ratios = torch.where(mask, ratio, 0.0)
    metrics = torch.stack(
        [number_of_tokens, count, torch.where(mask, kl, 0.0).sum(), entropy.sum(), ratios.sum()]
        + [
            ratios.max() if ratios.numel() else ratios.new_zeros(()),
            clip_low.sum().to(dtype),
            clip_high.sum().to(dtype),
        ]
    ).float()
    return loss, metrics, gradient, scales


class _Term(NamedTuple):
    """Per token: a loss and its two derivatives."""

    value: Tensor
    by_logprob: Tensor  # directly
    by_log_weight: Tensor  # through the log importance weight (of the token or of its sequence)


def _policy_term(
    logprob: Tensor,
    log_ratio: Tensor,
    ratio: Tensor,
    advantage: Tensor,
    behaviour: Tensor | None,
    mask: Tensor,
    tokens: Tokens,
    sequence: Tensor,
    options: LossOptions,
) -> _Term:
    zero = torch.zeros_like(logprob)
    if options.loss_type == "cispo":  # arXiv 2506.13585: the weight is clipped and held constant
        factor = -ratio.clamp(max=options.cispo_cap) * advantage
        return _Term(factor * logprob, factor, zero)
    if options.loss_type == "vespo":  # arXiv 2602.10693: gamma(w) = e^lambda w^k e^(-lambda w), held constant
        factor = -_vespo_weight(log_ratio, advantage, behaviour, mask, tokens, sequence, options) * advantage
        return _Term(factor * logprob, factor, zero)
    if options.loss_type == "sapo":  # arXiv 2511.20347: a sigmoid gate in place of the clip
        temperature = _by_sign(advantage > 0, options.sapo_temperature, advantage)
        gate = torch.sigmoid(temperature * (ratio - 1))
        slope = gate * (1 - gate)
        slope = torch.where(slope == 0, 0.0, slope * ratio)  # 0 x inf
        return _Term(-gate * 4 / temperature * advantage, zero, -4 * slope * advantage)
    low, high = 1.0 - options.clip_low, 1.0 + options.clip_high
    delta = math.inf if options.clip_delta is None else options.clip_delta
    free, clipped = ratio.clamp(max=delta) * advantage, ratio.clamp(low, high) * advantage
    free_slope = torch.where(ratio <= delta, ratio, 0.0) * advantage
    clipped_slope = torch.where((ratio >= low) & (ratio <= high), ratio, 0.0) * advantage
    slope = torch.where(
        free < clipped, free_slope, torch.where(free > clipped, clipped_slope, (free_slope + clipped_slope) / 2)
    )
    nothing = (advantage == 0) & ~ratio.isnan()  # also where the ratio overflowed
    return _Term(torch.where(nothing, 0.0, -torch.minimum(free, clipped)), zero, torch.where(nothing, 0.0, -slope))


def _vespo_weight(
    log_ratio: Tensor,
    advantage: Tensor,
    behaviour: Tensor | None,
    mask: Tensor,
    tokens: Tokens,
    sequence: Tensor,
    options: LossOptions,
) -> Tensor:
    lowest = math.log(1e-8)
    log_weight = segment_reduce(log_ratio.clamp(-20.0, 20.0), tokens.offsets)
    if behaviour is not None:
        log_weight = log_weight + segment_reduce(
            torch.where(mask, behaviour.log().clamp(lowest, 20.0), 0.0), tokens.offsets
        )
    log_weight = log_weight.clamp(lowest, 20.0)[sequence]
    k = _by_sign(advantage >= 0, options.vespo_k, advantage)
    scale = _by_sign(advantage >= 0, options.vespo_lambda, advantage).clamp(min=1e-4)
    return (scale + k * log_weight - scale * log_weight.exp()).exp()


def _by_sign(first: Tensor, pair: tuple[float, float], like: Tensor) -> Tensor:
    return torch.where(first, like.new_full((), pair[0]), like.new_full((), pair[1]))


def _behaviour_weight(
    tokens: Tokens,
    clean: Callable[[Tensor], Tensor],
    old: Tensor,
    mask: Tensor,
    sequence: Tensor,
    options: LossOptions,
) -> Tensor | None:
    """Return the detached weight of each token, exp(old - behaviour), truncated or zeroed beyond the cap."""
    if tokens.behaviour is None:
        return None
    log_weight = old - clean(tokens.behaviour)
    if options.behaviour_mode.startswith("sequence"):
        log_weight = segment_reduce(torch.where(mask, log_weight, 0.0), tokens.offsets)[sequence]
    weight = log_weight.exp()
    if options.behaviour_mode.endswith("truncate"):
        return weight.clamp(max=options.behaviour_cap)
    return torch.where(weight > options.behaviour_cap, 0.0, weight)


def _kl(difference: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """Return the estimate of KL(policy || reference) and its slope in the log-prob, from ref - logprob (Schulman's k1, k2, k3)."""
    if estimator == "k1":
        return -difference, torch.ones_like(difference)
    if estimator == "k2":
        return difference.square() / 2, -difference
    return difference.exp() - difference - 1, 1 - difference.exp()


def own_normalizer(number_of_tokens: Tensor, number_of_sequences: Tensor, options: LossOptions) -> Tensor:
    """Return what the loss of these alone is divided by."""
    if options.loss_type in COUNT_SEQUENCES:
        return number_of_sequences
    if options.loss_type == "dr_grpo":
        assert options.max_response_tokens is not None
        return number_of_sequences * options.max_response_tokens
    return number_of_tokens


def _or_one(count: Tensor) -> Tensor:
    return torch.where(count == 0, 1.0, count)  # nothing was counted, nothing is divided
