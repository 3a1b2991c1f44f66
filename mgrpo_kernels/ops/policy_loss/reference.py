"""The definition, in plain PyTorch: what every other backend is held to. The gradient is written out; tests hold it to autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import sequences
from mgrpo_kernels.backend import reference_unsupported as unsupported
from mgrpo_kernels.ops._statistics import statistics_dtype
from mgrpo_kernels.ops.policy_loss.loss_types import LOSSES, SEQUENCE_MEAN
from mgrpo_kernels.ops.policy_loss.specs import METRICS, Groups, LossOptions, Tokens, masks_sequences, masks_tokens
from mgrpo_kernels.sequences import segment_reduce

__all__ = ["forward", "group_advantages", "token_weights", "unsupported"]


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
    elif groups.scale == "mean":
        centred = centred / (mean.abs() + groups.eps)
    # Equal rewards teach nothing; the mean's rounding must not make them look different.
    highest = segment_reduce(torch.where(keep, kept, -torch.inf), offsets, "max")
    lowest = segment_reduce(torch.where(keep, kept, torch.inf), offsets, "min")
    silent = (count < 2) | (highest == lowest)
    return torch.where(keep & ~silent[group], centred, 0.0)


def token_weights(mask: Tensor, offsets: Tensor, options: LossOptions, dtype: torch.dtype) -> Tensor:
    """Return each token's share of the loss ``(T,)`` before the normalizer: 1 / length in means over sequences, else 1; 0 if masked."""
    share = mask.to(dtype)
    if LOSSES[options.loss_type].share == SEQUENCE_MEAN:
        share = share / segment_reduce(share, offsets).clamp(min=1)[sequences.group_index(offsets, mask.shape[0])]
    return share


def forward(tokens: Tokens, groups: Groups | None, options: LossOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss (0-d), metrics ``(9,)``, d loss / d logprob x normalizer ``(T,)``, and ``(2,)``: 1 / normalizer, entropy_coef / its own.

    All in float32 (float64 for float64 log-probs). Gradients are left undivided so that a kernel can write them in its only pass.
    """
    dtype = statistics_dtype(tokens.logprob)
    offsets = tokens.offsets
    sequence = sequences.group_index(offsets, tokens.logprob.shape[0])  # (T,)
    mask, count, advantages = _counted(tokens, groups, sequence, dtype)

    def clean(values: Tensor) -> Tensor:  # what a masked position holds is never read
        return torch.where(mask, values.to(dtype), 0.0)

    logprob, advantage = clean(tokens.logprob), clean(advantages)
    old = logprob if tokens.old is None else clean(tokens.old)
    log_ratio = logprob - old
    length = segment_reduce(mask.to(dtype), offsets).clamp(min=1)[sequence]  # (T,) of the token's sequence

    def total(values: Tensor) -> Tensor:  # (T,) over the token's sequence
        return segment_reduce(torch.where(mask, values, 0.0), offsets)[sequence]

    surrogate = LOSSES[options.loss_type].surrogate
    by_sequence = options.importance_level == "sequence" or surrogate.geometric_mean
    clipped, moves = _clip_log_ratio(log_ratio, advantage, options) if surrogate.geometric_mean else (log_ratio, mask)
    ratio = (total(clipped) / length if by_sequence else log_ratio).exp()
    log_behaviour = None if tokens.behaviour is None else old - clean(tokens.behaviour)
    behaviour = _behaviour_weight(log_behaviour, total, length, options)

    given = _Given(logprob, old, log_ratio, ratio, advantage, behaviour, mask, offsets, sequence)
    term, clip_low, clip_high = SURROGATES[surrogate.name](given, options)
    sampled = old if tokens.behaviour is None else clean(tokens.behaviour)
    weight = _sequence_masks(log_behaviour, sampled, given, total, length, options)
    if behaviour is not None and not surrogate.weighs_behaviour:
        weight = weight * behaviour
    term = _Term(*(_weighted(part, weight) for part in term))
    kl = torch.zeros_like(logprob)
    if tokens.ref is not None:
        kl, kl_slope = _kl(clean(tokens.ref) - logprob, options.kl_estimator)
        penalty = _Term(kl, kl_slope, torch.zeros_like(kl))
        if options.kl_bias_correction:
            kl = _weighted(kl, ratio)
            penalty = _Term(kl, _weighted(kl_slope, ratio), kl)
        term = _Term(*(part + options.kl_coef * extra for part, extra in zip(term, penalty, strict=True)))

    share = token_weights(mask, offsets, options, dtype) if tokens.weights is None else tokens.weights
    through_ratio = share * term.by_log_weight
    if by_sequence:  # d log_weight / d logprob = 1 / length, for every token of the sequence
        through_ratio = torch.where(moves, total(through_ratio) / length, 0.0)
    gradient = torch.where(mask, share * term.by_logprob + through_ratio, 0.0)

    entropy = torch.zeros_like(logprob) if tokens.entropy is None else clean(tokens.entropy)
    number_of_tokens = mask.sum().to(dtype)
    scales = _scales(tokens, number_of_tokens, count, options)
    loss = (share * torch.where(mask, term.value, 0.0)).sum() * scales[0] - entropy.sum() * scales[1]
    ratios = torch.where(mask, ratio, 0.0)
    metrics = {
        "tokens": number_of_tokens,
        "sequences": count,
        "kl_sum": torch.where(mask, kl, 0.0).sum(),
        "entropy_sum": entropy.sum(),
        "ratio_sum": ratios.sum(),
        "ratio_max": ratios.max() if ratios.numel() else ratios.new_zeros(()),
        "clip_low_count": (mask & clip_low).sum().to(dtype),
        "clip_high_count": (mask & clip_high).sum().to(dtype),
        "masked_count": (mask & (weight == 0)).sum().to(dtype) if masks_tokens(options) else torch.zeros_like(count),
    }
    return loss, torch.stack([metrics[name] for name in METRICS]).float(), gradient, scales


def _counted(
    tokens: Tokens, groups: Groups | None, sequence: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which tokens count ``(T,)``, how many sequences do (0-d), and the advantages ``(T,)``."""
    mask = torch.ones_like(tokens.logprob, dtype=torch.bool) if tokens.mask is None else tokens.mask
    count = torch.full((), tokens.offsets.shape[0] - 1, dtype=dtype, device=mask.device)
    advantages = tokens.advantages
    if groups is not None:
        advantages = group_advantages(groups)
        if groups.mask is not None:
            mask = mask & groups.mask[sequence]
            count = groups.mask.sum().to(dtype)
    assert advantages is not None
    if advantages.shape != mask.shape or tokens.offsets.shape[0] == advantages.shape[0] + 1:
        advantages = advantages[sequence]
    return mask, count, advantages


def _scales(tokens: Tokens, number_of_tokens: Tensor, count: Tensor, options: LossOptions) -> Tensor:
    """Return 1 / normalizer and entropy_coef / its own ``(2,)``; a count of 0 divides by 1."""
    normalizer, entropy_normalizer = tokens.normalizer, tokens.entropy_normalizer
    if normalizer is None:
        normalizer = LOSSES[options.loss_type].normalizer(number_of_tokens, count, options.max_response_tokens)
    if entropy_normalizer is None:
        entropy_normalizer = number_of_tokens
    dtype = number_of_tokens.dtype
    return torch.stack(
        [1.0 / _or_one(normalizer).to(dtype), options.entropy_coef / _or_one(entropy_normalizer).to(dtype)]
    )


class _Given(NamedTuple):
    """What a surrogate may read, per token ``(T,)`` but for the offsets; 0 where masked."""

    logprob: Tensor
    old: Tensor
    log_ratio: Tensor  # logprob - old
    ratio: Tensor  # the importance ratio, of the token or of its sequence
    advantage: Tensor
    behaviour: Tensor | None  # exp(old - behaviour), bounded
    mask: Tensor
    offsets: Tensor  # (B+1,)
    sequence: Tensor  # index of each token's sequence


class _Term(NamedTuple):
    """Per token: a loss and its two derivatives."""

    value: Tensor
    by_logprob: Tensor  # directly
    by_log_weight: Tensor  # through the log importance weight (of the token or of its sequence)


_Surrogate = tuple[_Term, Tensor, Tensor]  # and which ratios were clipped from below and from above, (T,) bool


def _clip(given: _Given, options: LossOptions) -> _Surrogate:
    """Clip the ratio as PPO does."""
    ratio, advantage = given.ratio, given.advantage
    low, high = 1.0 - options.clip_low, 1.0 + options.clip_high
    delta = math.inf if options.clip_delta is None else options.clip_delta
    free, clipped = ratio.clamp(max=delta) * advantage, ratio.clamp(low, high) * advantage
    free_slope = torch.where(ratio <= delta, ratio, 0.0) * advantage
    clipped_slope = torch.where((ratio >= low) & (ratio <= high), ratio, 0.0) * advantage
    slope = torch.where(
        free < clipped, free_slope, torch.where(free > clipped, clipped_slope, (free_slope + clipped_slope) / 2)
    )
    nothing = (advantage == 0) & ~ratio.isnan()  # also where the ratio overflowed
    value = torch.where(nothing, 0.0, -torch.minimum(free, clipped))
    term = _Term(value, torch.zeros_like(ratio), torch.where(nothing, 0.0, -slope))
    seen = ratio.clamp(max=delta)
    return term, (seen < low) & (advantage < 0), (seen > high) & (advantage > 0)


def _cispo(given: _Given, options: LossOptions) -> _Surrogate:
    """Clip the weight and hold it constant (arXiv 2506.13585)."""
    factor = -given.ratio.clamp(max=options.cispo_cap) * given.advantage
    clipped = (given.ratio > options.cispo_cap) & (given.advantage > 0)
    return _Term(factor * given.logprob, factor, torch.zeros_like(factor)), torch.zeros_like(clipped), clipped


def _sapo(given: _Given, options: LossOptions) -> _Surrogate:
    """Put a sigmoid gate in place of the clip (arXiv 2511.20347)."""
    advantage = given.advantage
    temperature = _by_sign(advantage > 0, options.sapo_temperature, advantage)
    gate = torch.sigmoid(temperature * (given.ratio - 1))
    slope = gate * (1 - gate)
    slope = torch.where(slope == 0, 0.0, slope * given.ratio)  # 0 x inf
    term = _Term(-gate * 4 / temperature * advantage, torch.zeros_like(gate), -4 * slope * advantage)
    return term, *_never_clipped(given)


def _vespo(given: _Given, options: LossOptions) -> _Surrogate:
    """Weight by gamma(w) = e^lambda w^k e^(-lambda w), held constant, with w the sequence's weight (arXiv 2602.10693)."""
    lowest = math.log(1e-8)
    log_weight = segment_reduce(given.log_ratio.clamp(-20.0, 20.0), given.offsets)
    if given.behaviour is not None:
        log_behaviour = torch.where(given.mask, given.behaviour.log().clamp(lowest, 20.0), 0.0)
        log_weight = log_weight + segment_reduce(log_behaviour, given.offsets)
    log_weight = log_weight.clamp(lowest, 20.0)[given.sequence]
    k = _by_sign(given.advantage >= 0, options.vespo_k, given.advantage)
    scale = _by_sign(given.advantage >= 0, options.vespo_lambda, given.advantage).clamp(min=1e-4)
    factor = -(scale + k * log_weight - scale * log_weight.exp()).exp() * given.advantage
    return _Term(factor * given.logprob, factor, torch.zeros_like(factor)), *_never_clipped(given)


def _dppo_tv(given: _Given, options: LossOptions) -> _Surrogate:
    """Mask tokens whose probability has moved too far in the direction of their advantage (arXiv 2602.04879)."""
    moved = given.logprob.exp() - given.old.exp()
    rise, fall = options.dppo_tv_bounds
    return _dppo(given, moved > rise, -moved > fall, options)


def _dppo_kl(given: _Given, options: LossOptions) -> _Surrogate:
    """Mask tokens by the KL divergence between new and old probability, each over this token and all others."""
    probability, before = given.logprob.exp().clamp(max=1.0), given.old.exp().clamp(max=1.0)
    of_token = torch.where(before == 0, 0.0, before * (given.old - given.logprob))  # 0 x inf
    divergence = of_token + (1.0 - before) * ((1.0 - before + 1e-8) / (1.0 - probability + 1e-8)).log()
    rise, fall = options.dppo_kl_bounds
    return _dppo(
        given, (divergence > rise) & (probability > before), (divergence > fall) & (probability < before), options
    )


def _dppo(given: _Given, too_high: Tensor, too_low: Tensor, options: LossOptions) -> _Surrogate:
    """Hold the truncated weight constant, except for masked tokens, which have no loss."""
    masked = torch.where(given.advantage > 0, too_high, too_low)
    factor = torch.where(masked, 0.0, -given.ratio.clamp(max=options.dppo_cap) * given.advantage)
    value = torch.where(masked, 0.0, factor * given.logprob)
    return (
        _Term(value, factor, torch.zeros_like(factor)),
        masked & (given.advantage < 0),
        masked & (given.advantage > 0),
    )


def _gmpo(given: _Given, options: LossOptions) -> _Surrogate:
    """Take the ratio as it is: its tokens have been clipped (arXiv 2507.20673)."""
    nothing = (given.advantage == 0) & ~given.ratio.isnan()  # also where the ratio overflowed
    value = torch.where(nothing, 0.0, -given.ratio * given.advantage)
    low = (given.log_ratio < -options.clip_low) & (given.advantage < 0)
    high = (given.log_ratio > options.clip_high) & (given.advantage > 0)
    return _Term(value, torch.zeros_like(value), value), low, high


def _clip_log_ratio(log_ratio: Tensor, advantage: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """Return log ratios clipped on the side where the advantage gains, and which of them were not, (T,) each. NaN stays."""
    too_high = (advantage > 0) & (log_ratio > options.clip_high)
    too_low = ~(advantage > 0) & (log_ratio < -options.clip_low)
    clipped = torch.where(too_high, options.clip_high, torch.where(too_low, -options.clip_low, log_ratio))
    return clipped, ~(too_high | too_low)


SURROGATES: dict[str, Callable[[_Given, LossOptions], _Surrogate]] = {
    "clip": _clip,
    "cispo": _cispo,
    "sapo": _sapo,
    "vespo": _vespo,
    "dppo_tv": _dppo_tv,
    "dppo_kl": _dppo_kl,
    "gmpo": _gmpo,
}


def _never_clipped(given: _Given) -> tuple[Tensor, Tensor]:
    never = torch.zeros_like(given.mask)
    return never, never


def _by_sign(first: Tensor, pair: tuple[float, float], like: Tensor) -> Tensor:
    return torch.where(first, like.new_full((), pair[0]), like.new_full((), pair[1]))


def _behaviour_weight(
    log_weight: Tensor | None, total: Callable[[Tensor], Tensor], length: Tensor, options: LossOptions
) -> Tensor | None:
    """Return the detached weight of each token, exp(old - behaviour), truncated to its bounds or zeroed outside."""
    level, _, bound = options.behaviour_mode.partition("_")
    if log_weight is None or level == "none":
        return None
    if level != "token":
        log_weight = total(log_weight) / length if level == "geometric" else total(log_weight)
    weight = log_weight.exp()
    floor, cap = options.behaviour_floor, options.behaviour_cap
    if bound == "truncate":
        return weight.clamp(floor, cap)
    return torch.where((weight < floor) | (weight > cap), 0.0, weight)


def _sequence_masks(
    log_behaviour: Tensor | None,
    sampled: Tensor,
    given: _Given,
    total: Callable[[Tensor], Tensor],
    length: Tensor,
    options: LossOptions,
) -> Tensor:
    """Return 0 for tokens of sequences that are masked, 1 for the others, and NaN where the mean that decides is NaN."""
    if not masks_sequences(options):
        return torch.ones_like(given.logprob)
    delta, cap = (math.inf if bound is None else bound for bound in (options.off_policy_delta, options.geometric_cap))
    keep = torch.ones_like(given.logprob)
    if log_behaviour is not None:
        weight = (total(log_behaviour) / length).exp()
        keep = _zero_where((weight < options.geometric_floor) | (weight > cap), weight)
    divergence = total(sampled - given.logprob) / length
    return torch.where(given.advantage < 0, keep * _zero_where(divergence > delta, divergence), keep)


def _zero_where(masked: Tensor, decided_by: Tensor) -> Tensor:
    return torch.where(masked, 0.0, torch.where(decided_by.isnan(), decided_by, 1.0))


def _weighted(part: Tensor, weight: Tensor) -> Tensor:
    """Return part x weight, where 0 x inf is 0. NaN stays."""
    product = part * weight
    return torch.where(product.isnan() & ~part.isnan() & ~weight.isnan(), 0.0, product)


def _kl(difference: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """Return the estimate of KL(policy || reference) and its slope in the log-prob, from ref - logprob (Schulman's k1, k2, k3)."""
    if estimator == "k1":
        return -difference, torch.ones_like(difference)
    if estimator == "k2":
        return difference.square() / 2, -difference
    return difference.exp() - difference - 1, 1 - difference.exp()


def _or_one(count: Tensor) -> Tensor:
    return torch.where(count == 0, 1.0, count)  # where no token was counted, the sum is 0 too
