"""The terms of a token's loss: elementwise functions that the loss kernel calls, each with its source in reference.py."""

import triton
import triton.language as tl

from mgrpo_kernels.ops._triton.kernels import clamp

VESPO_LOWEST = tl.constexpr(-18.420680743952367)  # log 1e-8


@triton.jit
def bound_weight(weight, floor, cap, TRUNCATE: tl.constexpr):
    """Truncate a behaviour weight to its bounds, or zero it outside."""
    if TRUNCATE:
        return clamp(weight, floor, cap)
    else:
        return tl.where((weight < floor) | (weight > cap), 0.0, weight)


@triton.jit
def zero_where(masked, decided_by):
    """Return 0 where masked, else 1, or NaN where what has decided is NaN."""
    return tl.where(masked, 0.0, tl.where(decided_by != decided_by, decided_by, 1.0))  # noqa: PLR0124


@triton.jit
def weighted(part, weight):
    """Return part x weight. A weight of 0 leaves nothing of an infinite part, but keeps NaN."""
    return tl.where((weight == 0.0) & (part == part), 0.0, part * weight)  # noqa: PLR0124


@triton.jit
def times_ratio(part, ratio):
    """Return part x ratio, where 0 x inf is 0. NaN stays. :func:`weighted`, whose weight is finite, takes fewer registers."""
    product = part * ratio
    return tl.where((product != product) & (part == part) & (ratio == ratio), 0.0, product)  # noqa: PLR0124


@triton.jit
def clips_log_ratio(log_ratio, advantage, lower, upper):
    """Return which log ratios gmpo clips from above, and which from below: on the side where the advantage gains."""
    return (advantage > 0) & (log_ratio > upper), ((advantage > 0) == 0) & (log_ratio < lower)


@triton.jit
def clip_log_ratio(log_ratio, advantage, lower, upper):
    """Clip log ratios as gmpo does. NaN stays."""
    too_high, too_low = clips_log_ratio(log_ratio, advantage, lower, upper)
    return tl.where(too_high, upper, tl.where(too_low, lower, log_ratio))


@triton.jit
def dppo_masks(x, before, advantage, rise, fall, SURROGATE: tl.constexpr):
    """Return the tokens that dppo masks: their probability has moved too far in the direction of their advantage."""
    probability, old = tl.exp(x), tl.exp(before)
    if SURROGATE == "dppo_tv":
        too_high, too_low = probability - old > rise, old - probability > fall
    else:
        probability, old = clamp(probability, 0.0, 1.0), clamp(old, 0.0, 1.0)
        of_token = tl.where(old == 0.0, 0.0, old * (before - x))  # 0 x inf
        divergence = of_token + (1.0 - old) * tl.log((1.0 - old + 1e-8) / (1.0 - probability + 1e-8))
        too_high, too_low = (divergence > rise) & (probability > old), (divergence > fall) & (probability < old)
    return tl.where(advantage > 0, too_high, too_low)


@triton.jit
def _gmpo_term(ratio, advantage):
    """Return loss and its slope in the log weight of a ratio whose tokens have been clipped."""
    some = (advantage != 0.0) | (ratio != ratio)  # noqa: PLR0124 - nothing where it is 0, even if the ratio overflowed
    value = tl.where(some, -ratio * advantage, 0.0)
    return value, value


@triton.jit
def _clipped_term(ratio, advantage, low, high, delta):
    """Return loss and its slope in the log weight of PPO's clipped surrogate; the mean of both slopes where they tie."""
    free = clamp(ratio, 0.0, delta) * advantage
    clipped = clamp(ratio, low, high) * advantage
    free_slope = tl.where(ratio <= delta, ratio, 0.0) * advantage
    clipped_slope = tl.where((ratio >= low) & (ratio <= high), ratio, 0.0) * advantage
    mean_slope = (free_slope + clipped_slope) / 2.0
    slope = tl.where(free < clipped, free_slope, tl.where(free > clipped, clipped_slope, mean_slope))
    value = tl.minimum(free, clipped, propagate_nan=tl.PropagateNan.ALL)
    some = (advantage != 0.0) | (ratio != ratio)  # noqa: PLR0124 - nothing where it is 0, even if the ratio overflowed
    return tl.where(some, -value, 0.0), tl.where(some, -slope, 0.0)


@triton.jit
def _sapo_term(ratio, advantage, temperature_high, temperature_low):
    """Return loss and its slope in the log weight of the sigmoid gate."""
    temperature = tl.where(advantage > 0, temperature_high, temperature_low)
    gate = 1.0 / (1.0 + tl.exp(-temperature * (ratio - 1.0)))
    slope = gate * (1.0 - gate)
    slope = tl.where(slope == 0.0, 0.0, slope * ratio)  # 0 x inf
    return -gate * 4.0 / temperature * advantage, -4.0 * slope * advantage


@triton.jit
def kl_term(difference, ESTIMATOR: tl.constexpr):
    """Return the estimate of KL(policy || reference) and its slope in the log-prob, from ref - logprob."""
    if ESTIMATOR == "k1":
        return -difference, tl.full(difference.shape, 1.0, tl.float32)
    elif ESTIMATOR == "k2":
        return difference * difference / 2.0, -difference
    else:
        power = tl.exp(difference)
        return power - difference - 1.0, 1.0 - power


@triton.jit
def surrogate_term(
    x,
    before,
    ratio,
    advantage,
    vespo_log_weight,
    lower,
    upper,
    clip_delta,
    cispo_cap,
    dppo_rise,
    dppo_fall,
    dppo_cap,
    sapo_temperature_high,
    sapo_temperature_low,
    vespo_k_high,
    vespo_k_low,
    vespo_lambda_high,
    vespo_lambda_low,
    SURROGATE: tl.constexpr,
):
    """Return the surrogate's loss of log-probs x, and its slopes: directly in the log-prob, and in the log importance weight."""
    zero = tl.zeros(x.shape, tl.float32)
    if SURROGATE == "cispo":  # the weight is clipped and held constant
        factor = -clamp(ratio, 0.0, cispo_cap) * advantage
        return factor * x, factor, zero
    elif SURROGATE == "vespo":  # so is e^lambda w^k e^(-lambda w)
        k = tl.where(advantage >= 0, vespo_k_high, vespo_k_low)
        rate = tl.maximum(tl.where(advantage >= 0, vespo_lambda_high, vespo_lambda_low), 1e-4)
        factor = -tl.exp(rate + k * vespo_log_weight - rate * tl.exp(vespo_log_weight)) * advantage
        return factor * x, factor, zero
    elif SURROGATE == "sapo":
        value, by_log_weight = _sapo_term(ratio, advantage, sapo_temperature_high, sapo_temperature_low)
        return value, zero, by_log_weight
    elif SURROGATE == "dppo_tv" or SURROGATE == "dppo_kl":  # noqa: PLR1714 - the compiler has no membership test
        masked = dppo_masks(x, before, advantage, dppo_rise, dppo_fall, SURROGATE)
        factor = tl.where(masked, 0.0, -clamp(ratio, 0.0, dppo_cap) * advantage)
        return tl.where(masked, 0.0, factor * x), factor, zero
    elif SURROGATE == "gmpo":
        value, by_log_weight = _gmpo_term(ratio, advantage)
        return value, zero, by_log_weight
    else:
        tl.static_assert(SURROGATE == "clip", "this kernel has no such surrogate")
        value, by_log_weight = _clipped_term(ratio, advantage, lower, upper, clip_delta)
        return value, zero, by_log_weight


@triton.jit
def count_clips(
    low,
    high,
    keep,
    x,
    before,
    ratio,
    advantage,
    lower,
    upper,
    clip_delta,
    cispo_cap,
    dppo_rise,
    dppo_fall,
    SURROGATE: tl.constexpr,
    HAS_DELTA: tl.constexpr,
):
    """Add to the counts the tokens whose ratio was clipped, from below and from above."""
    if SURROGATE == "cispo":
        high += (keep & (ratio > cispo_cap) & (advantage > 0)).to(tl.float32)
    elif SURROGATE == "clip":
        seen = ratio
        if HAS_DELTA:
            seen = clamp(ratio, 0.0, clip_delta)
        low += (keep & (seen < lower) & (advantage < 0)).to(tl.float32)
        high += (keep & (seen > upper) & (advantage > 0)).to(tl.float32)
    elif SURROGATE == "gmpo":
        too_high, too_low = clips_log_ratio(x - before, advantage, lower, upper)
        low += (keep & too_low & (advantage < 0)).to(tl.float32)
        high += (keep & too_high).to(tl.float32)
    elif SURROGATE == "dppo_tv" or SURROGATE == "dppo_kl":  # noqa: PLR1714
        masked = keep & dppo_masks(x, before, advantage, dppo_rise, dppo_fall, SURROGATE)
        low += (masked & (advantage < 0)).to(tl.float32)
        high += (masked & (advantage > 0)).to(tl.float32)
    return low, high
