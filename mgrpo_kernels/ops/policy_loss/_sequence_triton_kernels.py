"""What a token needs of its sequence, and what it gives to it: functions that the loss kernel calls for one sequence."""

import triton
import triton.language as tl

from mgrpo_kernels.ops._triton.kernels import clamp
from mgrpo_kernels.ops.policy_loss._term_triton_kernels import (
    VESPO_LOWEST,
    bound_weight,
    clip_log_ratio,
    clips_log_ratio,
    zero_where,
)


@triton.jit
def at(values, i, inside, keep):
    """Return values as float32, 0 where not kept: what a masked position holds goes nowhere."""
    return tl.where(keep, tl.load(values + i, mask=inside, other=0.0).to(tl.float32), 0.0)


@triton.jit
def kept(mask, rollout_kept, i, inside):
    keep = inside & rollout_kept
    if mask is not None:
        keep = keep & (tl.load(mask + i, mask=inside, other=0) != 0)
    return keep


@triton.jit
def sequence_sums(
    logprob,
    old,
    behaviour,
    advantages,
    mask,
    rollout_kept,
    begin,
    end,
    sequence_advantage,
    lower,
    upper,
    behaviour_floor,
    behaviour_cap,
    SURROGATE: tl.constexpr,
    BY_SEQUENCE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BEHAVIOUR: tl.constexpr,
    TRUNCATE: tl.constexpr,
    MASKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return a sequence's tokens, and sums over them: log ratio, log behaviour weight, sampled - logprob, vespo's log weight."""
    length = tl.zeros([BLOCK], tl.float32)
    log_ratios = tl.zeros([BLOCK], tl.float32)
    log_behaviours = tl.zeros([BLOCK], tl.float32)
    divergences = tl.zeros([BLOCK], tl.float32)
    vespo_log_weights = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < end
        keep = kept(mask, rollout_kept, i, inside)
        length += keep.to(tl.float32)
        if BY_SEQUENCE or SURROGATE == "vespo" or BEHAVIOUR == "sequence" or BEHAVIOUR == "geometric" or MASKS:  # noqa: PLR1714
            x = at(logprob, i, inside, keep)
            before = x if old is None else at(old, i, inside, keep)
            log_ratio = x - before
            if SURROGATE == "vespo":
                vespo_log_weights += clamp(log_ratio, -20.0, 20.0)
                if BEHAVIOUR == "token":  # there weights are per token, and enter by their logarithm
                    weight = tl.exp(before - at(behaviour, i, inside, keep))
                    weight = bound_weight(weight, behaviour_floor, behaviour_cap, TRUNCATE)
                    vespo_log_weights += tl.where(keep, clamp(tl.log(weight), VESPO_LOWEST, 20.0), 0.0)
            if SURROGATE == "gmpo":
                advantage = at(advantages, i, inside, keep) if PER_TOKEN else tl.where(keep, sequence_advantage, 0.0)
                log_ratio = clip_log_ratio(log_ratio, advantage, lower, upper)
            log_ratios += log_ratio
            if MASKS or BEHAVIOUR == "sequence" or BEHAVIOUR == "geometric":  # noqa: PLR1714
                sampled = before if behaviour is None else at(behaviour, i, inside, keep)
                log_behaviours += before - sampled
                divergences += sampled - x
    vespo_log_weight = clamp(tl.sum(vespo_log_weights, 0), VESPO_LOWEST, 20.0)
    return tl.sum(length, 0), tl.sum(log_ratios, 0), tl.sum(log_behaviours, 0), tl.sum(divergences, 0), vespo_log_weight


@triton.jit
def sequence_weight_of(
    log_behaviour, divisor, floor, cap, geometric_floor, geometric_cap, BEHAVIOUR: tl.constexpr, TRUNCATE: tl.constexpr
):
    """Return the bounded behaviour weight of a sequence, and 0 or 1: whether its geometric mean is within its bounds."""
    mean = tl.exp(log_behaviour / divisor)
    weight = mean if BEHAVIOUR == "geometric" else tl.exp(log_behaviour)
    return bound_weight(weight, floor, cap, TRUNCATE), zero_where(
        (mean < geometric_floor) | (mean > geometric_cap), mean
    )


@triton.jit
def add_through_ratio(
    gradient,
    through,
    divisor,
    logprob,
    old,
    advantages,
    mask,
    rollout_kept,
    begin,
    end,
    sequence_advantage,
    lower,
    upper,
    SURROGATE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add to every token's gradient what goes through the sequence's ratio: d log weight / d logprob = 1 / length."""
    tl.debug_barrier()
    shared = tl.sum(through, 0) / divisor
    for first in range(begin, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < end
        keep = kept(mask, rollout_kept, i, inside)
        direct = tl.load(gradient + i, mask=inside, other=0.0)
        if SURROGATE == "gmpo":  # a token that is clipped does not move the ratio
            x = at(logprob, i, inside, keep)
            before = x if old is None else at(old, i, inside, keep)
            advantage = at(advantages, i, inside, keep) if PER_TOKEN else tl.where(keep, sequence_advantage, 0.0)
            too_high, too_low = clips_log_ratio(x - before, advantage, lower, upper)
            added = tl.where(too_high | too_low, 0.0, shared)
        else:
            added = shared
        tl.store(gradient + i, tl.where(keep, direct + added, 0.0), mask=inside)
