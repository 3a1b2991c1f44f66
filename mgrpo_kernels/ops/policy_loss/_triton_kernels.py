"""Kernels of advantages and losses. A program takes one rollout, which is one sequence; the last to finish adds them up."""

import triton
import triton.language as tl

from mgrpo_kernels.ops._triton.kernels import clamp

# Rows of the partial sums ``(9, B)``: the loss, then the metrics in the order of specs.METRICS.
LOSS, TOKENS, SEQUENCES, KL, ENTROPY, RATIO, RATIO_MAX, CLIP_LOW, CLIP_HIGH = (tl.constexpr(i) for i in range(9))
FINISH_WIDTH = tl.constexpr(128)  # sequences added at once: 16 values a thread
VESPO_LOWEST = tl.constexpr(-18.420680743952367)  # log 1e-8


@triton.jit
def _kept_rewards(rewards, rollout_mask, i, inside):
    """Return rewards, 0 where not kept, and which are kept."""
    keep = inside
    if rollout_mask is not None:
        keep = inside & (tl.load(rollout_mask + i, mask=inside, other=0) != 0)
    return tl.where(keep, tl.load(rewards + i, mask=inside, other=0.0).to(tl.float32), 0.0), keep


@triton.jit
def _moments(rewards, rollout_mask, begin, end, BLOCK: tl.constexpr):
    """Return count, sum, sum of squared deviations, highest and lowest of the kept rewards in [begin, end)."""
    count = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    for first in range(begin, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        values, keep = _kept_rewards(rewards, rollout_mask, i, i < end)
        count += keep.to(tl.float32)
        total += values
        highest = tl.where(keep, tl.maximum(highest, values), highest)
        lowest = tl.where(keep, tl.minimum(lowest, values), lowest)
    number = tl.sum(count, 0)
    total_sum = tl.sum(total, 0)
    mean = total_sum / tl.maximum(number, 1.0)
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        values, keep = _kept_rewards(rewards, rollout_mask, i, i < end)
        squares += tl.where(keep, (values - mean) * (values - mean), 0.0)
    return number, total_sum, tl.sum(squares, 0), tl.max(highest, 0), tl.min(lowest, 0)


@triton.jit
def _deviation(number, squares):
    return tl.sqrt(squares / tl.maximum(number - 1.0, 1.0))


@triton.jit
def _advantage(
    rollout, rewards, offsets, rollout_mask, batch, groups, eps,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return a rollout's advantage over its group. Every program of a group computes the same: no launch waits for it."""
    group = 0
    for first in range(0, groups, BLOCK):
        i = first + tl.arange(0, BLOCK)
        ends = tl.load(offsets + 1 + i, mask=i < groups, other=9223372036854775807)
        group += tl.sum((ends <= rollout).to(tl.int32), 0)
    group = tl.minimum(group, groups - 1)
    begin = tl.load(offsets + group)
    end = tl.load(offsets + group + 1)
    number, total, squares, highest, lowest = _moments(rewards, rollout_mask, begin, end, BLOCK)
    reward, keep = _kept_rewards(rewards, rollout_mask, rollout, rollout < batch)
    if BASELINE == "leave_one_out":
        centred = reward - (total - reward) / tl.maximum(number - 1.0, 1.0)
    else:
        centred = reward - total / tl.maximum(number, 1.0)
    if SCALE == "std":
        centred = centred / (_deviation(number, squares) + eps)
    elif SCALE == "batch":
        all_number, _, all_squares, _, _ = _moments(rewards, rollout_mask, 0, batch, BLOCK)
        centred = centred / (_deviation(all_number, all_squares) + eps)
    # A NaN reward is neither highest nor lowest, but it is in the total.
    silent = (number < 2.0) | ((highest == lowest) & (total == total))  # noqa: PLR0124
    return tl.where(keep & (silent == 0), centred, 0.0)


@triton.jit(do_not_specialize=["batch", "groups"])
def advantages_kernel(
    rewards, group_offsets, rollout_mask, advantages, batch, groups, eps,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the advantage of rollout ``program_id(0)``."""
    rollout = tl.program_id(0)
    result = _advantage(rollout, rewards, group_offsets, rollout_mask, batch, groups, eps, BASELINE, SCALE, BLOCK)
    tl.store(advantages + rollout, result)


@triton.jit
def _at(values, i, inside, keep):
    """Return values as float32, 0 where not kept: what a masked position holds goes nowhere."""
    return tl.where(keep, tl.load(values + i, mask=inside, other=0.0).to(tl.float32), 0.0)


@triton.jit
def _kept(mask, rollout_kept, i, inside):
    keep = inside & rollout_kept
    if mask is not None:
        keep = keep & (tl.load(mask + i, mask=inside, other=0) != 0)
    return keep


@triton.jit
def _cap_weight(weight, cap, TRUNCATE: tl.constexpr):
    """Truncate a behaviour weight at the cap, or zero it beyond."""
    return tl.where(weight > cap, cap if TRUNCATE else 0.0, weight)


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
def _kl(difference, ESTIMATOR: tl.constexpr):
    """Return the estimate of KL(policy || reference) and its slope in the log-prob, from ref - logprob."""
    if ESTIMATOR == "k1":
        return -difference, tl.full(difference.shape, 1.0, tl.float32)
    elif ESTIMATOR == "k2":
        return difference * difference / 2.0, -difference
    else:
        power = tl.exp(difference)
        return power - difference - 1.0, 1.0 - power


@triton.jit
def _finish(
    partial, batch, normalizer, entropy_normalizer, entropy_coef, max_response_tokens, loss, metrics, scales,
    COUNTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add up all sequences in one fixed order, so that the bits do not depend on who finished last."""
    sums = tl.zeros([16, WIDTH], tl.float32)
    highest = tl.zeros([WIDTH], tl.float32)
    field = tl.arange(0, 16)[:, None]
    for first in range(0, batch, WIDTH):
        i = first + tl.arange(0, WIDTH)
        # Past the first cache, which other multiprocessors do not write through.
        place = partial + field * tl.cast(batch, tl.int64) + i[None, :]
        sums += tl.load(place, mask=(field < 9) & (i[None, :] < batch), other=0.0, cache_modifier=".cg")
        one = tl.load(
            partial + RATIO_MAX * tl.cast(batch, tl.int64) + i, mask=i < batch, other=0.0, cache_modifier=".cg"
        )
        highest = tl.maximum(highest, one, propagate_nan=tl.PropagateNan.ALL)
    totals = tl.sum(sums, 1)
    number = tl.arange(0, 16)
    tokens = tl.sum(tl.where(number == TOKENS, totals, 0.0), 0)
    sequences = tl.sum(tl.where(number == SEQUENCES, totals, 0.0), 0)
    value = tl.sum(tl.where(number == LOSS, totals, 0.0), 0)
    entropy = tl.sum(tl.where(number == ENTROPY, totals, 0.0), 0)
    if normalizer is not None:
        count = tl.load(normalizer)
    elif COUNTS == "tokens":
        count = tokens
    elif COUNTS == "sequences x max_response_tokens":
        count = sequences * max_response_tokens
    else:
        tl.static_assert(COUNTS == "sequences", "this kernel cannot count that")
        count = sequences
    entropy_count = tokens
    if entropy_normalizer is not None:
        entropy_count = tl.load(entropy_normalizer)
    scale = 1.0 / tl.where(count == 0.0, 1.0, count)  # nothing was counted, nothing is divided
    entropy_scale = entropy_coef / tl.where(entropy_count == 0.0, 1.0, entropy_count)
    tl.store(scales, scale)
    tl.store(scales + 1, entropy_scale)
    tl.store(loss, value * scale - entropy * entropy_scale)
    some_nan = tl.sum((highest != highest).to(tl.int32), 0) > 0  # noqa: PLR0124
    ratio_max = tl.where(some_nan, float("nan"), tl.max(highest, 0))
    totals = tl.where(number == RATIO_MAX, ratio_max, totals)
    tl.store(metrics + number - 1, totals, mask=(number > 0) & (number < 9))


@triton.jit(do_not_specialize=["batch", "groups"])
def loss_kernel(
    logprob, old, advantages, mask, offsets, ref, entropy, behaviour, normalizer, entropy_normalizer, weights,
    rewards, group_offsets, rollout_mask, loss, metrics, gradient, scales, partial, counter,
    batch, groups, eps, lower, upper, clip_delta, kl_coef, entropy_coef, behaviour_cap, cispo_cap,
    sapo_temperature_high, sapo_temperature_low, vespo_k_high, vespo_k_low, vespo_lambda_high, vespo_lambda_low,
    max_response_tokens,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, SURROGATE: tl.constexpr, SEQUENCE_MEAN: tl.constexpr, COUNTS: tl.constexpr,
    BY_SEQUENCE: tl.constexpr, PER_TOKEN: tl.constexpr, KL_ESTIMATOR: tl.constexpr, KL_BIAS_CORRECTION: tl.constexpr,
    TRUNCATE: tl.constexpr, BEHAVIOUR_BY_SEQUENCE: tl.constexpr, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of sequence ``program_id(0)`` and its sums; the last program turns all sums into loss and metrics."""
    sequence = tl.program_id(0)
    exists = sequence < batch  # without any sequence there is one program, which finishes
    begin = tl.load(offsets + sequence, mask=exists, other=0)
    end = tl.load(offsets + sequence + 1, mask=exists, other=0)
    rollout_kept = exists
    if rollout_mask is not None:
        rollout_kept = exists & (tl.load(rollout_mask + sequence, mask=exists, other=0) != 0)
    lanes = tl.arange(0, BLOCK)

    # First what a token needs of its whole sequence.
    length = tl.zeros([BLOCK], tl.float32)
    log_ratios = tl.zeros([BLOCK], tl.float32)
    clamped_log_ratios = tl.zeros([BLOCK], tl.float32)
    log_behaviours = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, end, BLOCK):
        i = first + lanes
        inside = i < end
        keep = _kept(mask, rollout_kept, i, inside)
        length += keep.to(tl.float32)
        if BY_SEQUENCE or SURROGATE == "vespo" or BEHAVIOUR_BY_SEQUENCE:
            x = _at(logprob, i, inside, keep)
            before = x if old is None else _at(old, i, inside, keep)
            log_ratios += x - before
            clamped_log_ratios += clamp(x - before, -20.0, 20.0)
            if behaviour is not None:
                log_behaviour = before - _at(behaviour, i, inside, keep)
                if SURROGATE == "vespo":  # there weights are per token, and enter by their logarithm
                    weight = _cap_weight(tl.exp(log_behaviour), behaviour_cap, TRUNCATE)
                    log_behaviour = clamp(tl.log(weight), VESPO_LOWEST, 20.0)
                log_behaviours += tl.where(keep, log_behaviour, 0.0)
    tokens = tl.sum(length, 0)
    divisor = tl.maximum(tokens, 1.0)
    mean_log_ratio = tl.sum(log_ratios, 0) / divisor
    log_behaviour_sum = tl.sum(log_behaviours, 0)
    vespo_log_weight = clamp(tl.sum(clamped_log_ratios, 0) + log_behaviour_sum, VESPO_LOWEST, 20.0)
    if rewards is not None:
        sequence_advantage = _advantage(
            sequence, rewards, group_offsets, rollout_mask, batch, groups, eps, BASELINE, SCALE, BLOCK
        )
    elif not PER_TOKEN:
        sequence_advantage = tl.load(advantages + sequence, mask=exists, other=0.0).to(tl.float32)

    values = tl.zeros([BLOCK], tl.float32)
    kls = tl.zeros([BLOCK], tl.float32)
    entropies = tl.zeros([BLOCK], tl.float32)
    ratios = tl.zeros([BLOCK], tl.float32)
    ratio_max = tl.zeros([BLOCK], tl.float32)
    clips_low = tl.zeros([BLOCK], tl.float32)
    clips_high = tl.zeros([BLOCK], tl.float32)
    through = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, end, BLOCK):
        i = first + lanes
        inside = i < end
        keep = _kept(mask, rollout_kept, i, inside)
        x = _at(logprob, i, inside, keep)
        before = x if old is None else _at(old, i, inside, keep)
        if PER_TOKEN:
            advantage = _at(advantages, i, inside, keep)
        else:
            advantage = tl.where(keep, sequence_advantage, 0.0)
        ratio = tl.exp((tl.zeros([BLOCK], tl.float32) + mean_log_ratio) if BY_SEQUENCE else (x - before))

        by_logprob = tl.zeros([BLOCK], tl.float32)
        by_log_weight = tl.zeros([BLOCK], tl.float32)
        if SURROGATE == "cispo":  # the weight is clipped and held constant
            by_logprob = -clamp(ratio, 0.0, cispo_cap) * advantage
            value = by_logprob * x
        elif SURROGATE == "vespo":  # so is e^lambda w^k e^(-lambda w)
            k = tl.where(advantage >= 0, vespo_k_high, vespo_k_low)
            rate = tl.maximum(tl.where(advantage >= 0, vespo_lambda_high, vespo_lambda_low), 1e-4)
            by_logprob = -tl.exp(rate + k * vespo_log_weight - rate * tl.exp(vespo_log_weight)) * advantage
            value = by_logprob * x
        elif SURROGATE == "sapo":
            value, by_log_weight = _sapo_term(ratio, advantage, sapo_temperature_high, sapo_temperature_low)
        else:
            tl.static_assert(SURROGATE == "clip", "this kernel has no such surrogate")
            value, by_log_weight = _clipped_term(ratio, advantage, lower, upper, clip_delta)
        if behaviour is not None and SURROGATE != "vespo":
            log_behaviour = before - _at(behaviour, i, inside, keep)
            if BEHAVIOUR_BY_SEQUENCE:
                log_behaviour = tl.zeros([BLOCK], tl.float32) + log_behaviour_sum
            weight = _cap_weight(tl.exp(log_behaviour), behaviour_cap, TRUNCATE)
            value *= weight
            by_logprob *= weight
            by_log_weight *= weight
        if ref is not None:
            kl, kl_slope = _kl(_at(ref, i, inside, keep) - x, KL_ESTIMATOR)
            if KL_BIAS_CORRECTION:
                kl *= ratio
                kl_slope *= ratio
                by_log_weight += kl_coef * kl
            value += kl_coef * kl
            by_logprob += kl_coef * kl_slope
            kls += tl.where(keep, kl, 0.0)

        if weights is not None:
            share = _at(weights, i, inside, keep)
        elif SEQUENCE_MEAN:
            share = tl.where(keep, 1.0 / divisor, 0.0)
        else:
            share = keep.to(tl.float32)
        values += tl.where(keep, share * value, 0.0)
        slope = share * by_logprob
        if BY_SEQUENCE:
            through += tl.where(keep, share * by_log_weight, 0.0)
        else:
            slope += share * by_log_weight
        tl.store(gradient + i, tl.where(keep, slope, 0.0), mask=inside)

        if entropy is not None:
            entropies += _at(entropy, i, inside, keep)
        kept_ratio = tl.where(keep, ratio, 0.0)
        ratios += kept_ratio
        ratio_max = tl.maximum(ratio_max, kept_ratio, propagate_nan=tl.PropagateNan.ALL)
        if SURROGATE == "cispo":
            clips_high += (keep & (ratio > cispo_cap) & (advantage > 0)).to(tl.float32)
        elif SURROGATE == "clip":
            seen = ratio
            if HAS_DELTA:
                seen = clamp(ratio, 0.0, clip_delta)
            clips_low += (keep & (seen < lower) & (advantage < 0)).to(tl.float32)
            clips_high += (keep & (seen > upper) & (advantage > 0)).to(tl.float32)

    if BY_SEQUENCE:  # every token moves the sequence's weight: d log weight / d logprob = 1 / length
        tl.debug_barrier()
        shared = tl.sum(through, 0) / divisor
        for first in range(begin, end, BLOCK):
            i = first + lanes
            inside = i < end
            keep = _kept(mask, rollout_kept, i, inside)
            direct = tl.load(gradient + i, mask=inside, other=0.0)
            tl.store(gradient + i, tl.where(keep, direct + shared, 0.0), mask=inside)

    if exists:
        stride = tl.cast(batch, tl.int64)
        place = partial + sequence
        tl.store(place + LOSS * stride, tl.sum(values, 0))
        tl.store(place + TOKENS * stride, tokens)
        tl.store(place + SEQUENCES * stride, rollout_kept.to(tl.float32))
        tl.store(place + KL * stride, tl.sum(kls, 0))
        tl.store(place + ENTROPY * stride, tl.sum(entropies, 0))
        tl.store(place + RATIO * stride, tl.sum(ratios, 0))
        some_nan = tl.sum((ratio_max != ratio_max).to(tl.int32), 0) > 0  # noqa: PLR0124
        tl.store(place + RATIO_MAX * stride, tl.where(some_nan, float("nan"), tl.max(ratio_max, 0)))
        tl.store(place + CLIP_LOW * stride, tl.sum(clips_low, 0))
        tl.store(place + CLIP_HIGH * stride, tl.sum(clips_high, 0))
    tl.debug_barrier()  # all of this program's sums are written before it says so
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        _finish(
            partial, batch, normalizer, entropy_normalizer, entropy_coef, max_response_tokens, loss, metrics, scales,
            COUNTS, FINISH_WIDTH,
        )  # fmt: skip
