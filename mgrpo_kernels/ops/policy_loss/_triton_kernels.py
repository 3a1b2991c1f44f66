"""Kernels of advantages and losses. A program takes one rollout, which is one sequence; the last to finish adds them up."""

import triton
import triton.language as tl

from mgrpo_kernels.ops.policy_loss._advantage_triton_kernels import advantage_of
from mgrpo_kernels.ops.policy_loss._sequence_triton_kernels import (
    add_through_ratio,
    at,
    kept,
    sequence_sums,
    sequence_weight_of,
)
from mgrpo_kernels.ops.policy_loss._term_triton_kernels import (
    bound_weight,
    count_clips,
    kl_term,
    surrogate_term,
    times_ratio,
    weighted,
    zero_where,
)

# Rows of the partial sums ``(10, B)``: the loss, then the metrics in the order of specs.METRICS.
LOSS, TOKENS, SEQUENCES, KL, ENTROPY, RATIO, RATIO_MAX, CLIP_LOW, CLIP_HIGH, MASKED = (
    tl.constexpr(i) for i in range(10)
)
FINISH_WIDTH = tl.constexpr(128)  # sequences added at once: 16 values a thread


@triton.jit(do_not_specialize=["batch", "groups"])
def advantages_kernel(
    rewards,
    group_offsets,
    rollout_mask,
    advantages,
    batch,
    groups,
    eps,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the advantage of rollout ``program_id(0)``."""
    rollout = tl.program_id(0)
    result = advantage_of(rollout, rewards, group_offsets, rollout_mask, batch, groups, eps, BASELINE, SCALE, BLOCK)
    tl.store(advantages + rollout, result)


@triton.jit
def _finish(
    partial,
    batch,
    normalizer,
    entropy_normalizer,
    entropy_coef,
    max_response_tokens,
    loss,
    metrics,
    scales,
    COUNTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add up all sequences in one fixed order, so that the bits do not depend on who finished last."""
    sums = tl.zeros([16, WIDTH], tl.float32)
    highest = tl.zeros([WIDTH], tl.float32)
    field = tl.arange(0, 16)[:, None]
    for first in range(0, batch, WIDTH):
        i = first + tl.arange(0, WIDTH)
        # Past the first cache, which other multiprocessors do not write through.
        place = partial + field * tl.cast(batch, tl.int64) + i[None, :]
        sums += tl.load(place, mask=(field <= MASKED) & (i[None, :] < batch), other=0.0, cache_modifier=".cg")
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
    scale = 1.0 / tl.where(count == 0.0, 1.0, count)  # where no token was counted, the sum is 0 too
    entropy_scale = entropy_coef / tl.where(entropy_count == 0.0, 1.0, entropy_count)
    tl.store(scales, scale)
    tl.store(scales + 1, entropy_scale)
    tl.store(loss, value * scale - entropy * entropy_scale)
    some_nan = tl.sum((highest != highest).to(tl.int32), 0) > 0  # noqa: PLR0124
    ratio_max = tl.where(some_nan, float("nan"), tl.max(highest, 0))
    totals = tl.where(number == RATIO_MAX, ratio_max, totals)
    tl.store(metrics + number - 1, totals, mask=(number > 0) & (number <= MASKED))


@triton.jit
def _share(weights, i, inside, keep, divisor, SEQUENCE_MEAN: tl.constexpr):
    """Return each token's share of the loss, 0 where not kept."""
    if weights is not None:
        return at(weights, i, inside, keep)
    elif SEQUENCE_MEAN:
        return tl.where(keep, 1.0 / divisor, 0.0)
    else:
        return keep.to(tl.float32)


@triton.jit
def _store_sums(
    partial,
    sequence,
    batch,
    values,
    tokens,
    rollout_kept,
    kls,
    entropies,
    ratios,
    ratio_max,
    clips_low,
    clips_high,
    masked,
):
    """Write a sequence's sums to its column of the partial sums."""
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
    tl.store(place + MASKED * stride, tl.sum(masked, 0))


@triton.jit
def _token_pass(
    logprob, old, advantages, mask, ref, entropy, behaviour, weights, gradient,
    rollout_kept, begin, end, sequence_advantage, divisor, mean_log_ratio, sequence_weight, keep_negative, keep_others,
    vespo_log_weight, lower, upper, clip_delta, kl_coef, behaviour_floor, behaviour_cap, cispo_cap, sapo_temperature_high,
    sapo_temperature_low, vespo_k_high, vespo_k_low, vespo_lambda_high, vespo_lambda_low, dppo_rise, dppo_fall, dppo_cap,
    SURROGATE: tl.constexpr, SEQUENCE_MEAN: tl.constexpr, BY_SEQUENCE: tl.constexpr, PER_TOKEN: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr, KL_BIAS_CORRECTION: tl.constexpr, BEHAVIOUR: tl.constexpr, TRUNCATE: tl.constexpr,
    MASKS: tl.constexpr, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a sequence's tokens, but for what goes through its ratio, and return what they add up to."""
    zero = tl.zeros([BLOCK], tl.float32)
    values, kls, entropies, ratios = zero, zero, zero, zero
    ratio_max, clips_low, clips_high, masked, through = zero, zero, zero, zero, zero
    for first in range(begin, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < end
        keep = kept(mask, rollout_kept, i, inside)
        x = at(logprob, i, inside, keep)
        before = x if old is None else at(old, i, inside, keep)
        advantage = at(advantages, i, inside, keep) if PER_TOKEN else tl.where(keep, sequence_advantage, 0.0)
        ratio = tl.exp((zero + mean_log_ratio) if BY_SEQUENCE else (x - before))
        value, by_logprob, by_log_weight = surrogate_term(
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
            SURROGATE,
        )
        if MASKS or (BEHAVIOUR != "none" and SURROGATE != "vespo"):
            weight = zero + 1.0
            if BEHAVIOUR == "token" and SURROGATE != "vespo":
                ratio_to_sampler = tl.exp(before - at(behaviour, i, inside, keep))
                weight = bound_weight(ratio_to_sampler, behaviour_floor, behaviour_cap, TRUNCATE)
            elif BEHAVIOUR == "sequence" or BEHAVIOUR == "geometric":  # noqa: PLR1714
                weight = zero + sequence_weight
            if MASKS:
                weight = weight * tl.where(advantage < 0, keep_negative, keep_others)
            value, by_logprob = weighted(value, weight), weighted(by_logprob, weight)
            by_log_weight = weighted(by_log_weight, weight)
            if MASKS or not TRUNCATE:  # truncated weights mask nothing
                masked += (keep & (weight == 0.0)).to(tl.float32)
        if ref is not None:
            kl, kl_slope = kl_term(at(ref, i, inside, keep) - x, KL_ESTIMATOR)
            if KL_BIAS_CORRECTION:
                kl, kl_slope = times_ratio(kl, ratio), times_ratio(kl_slope, ratio)
                by_log_weight += kl_coef * kl
            value, by_logprob = value + kl_coef * kl, by_logprob + kl_coef * kl_slope
            kls += tl.where(keep, kl, 0.0)
        share = _share(weights, i, inside, keep, divisor, SEQUENCE_MEAN)
        values += tl.where(keep, share * value, 0.0)
        slope = share * by_logprob
        if BY_SEQUENCE:
            through += tl.where(keep, share * by_log_weight, 0.0)
        else:
            slope += share * by_log_weight
        tl.store(gradient + i, tl.where(keep, slope, 0.0), mask=inside)
        if entropy is not None:
            entropies += at(entropy, i, inside, keep)
        kept_ratio = tl.where(keep, ratio, 0.0)
        ratios += kept_ratio
        ratio_max = tl.maximum(ratio_max, kept_ratio, propagate_nan=tl.PropagateNan.ALL)
        clips_low, clips_high = count_clips(
            clips_low,
            clips_high,
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
            SURROGATE,
            HAS_DELTA,
        )
    return values, kls, entropies, ratios, ratio_max, clips_low, clips_high, masked, through


@triton.jit(do_not_specialize=["batch", "groups"])
def loss_kernel(
    logprob, old, advantages, mask, offsets, ref, entropy, behaviour, normalizer, entropy_normalizer, weights,
    rewards, group_offsets, rollout_mask, loss, metrics, gradient, scales, partial, counter,
    batch, groups, eps, lower, upper, clip_delta, kl_coef, entropy_coef, behaviour_cap, behaviour_floor, geometric_cap,
    geometric_floor, off_policy_delta, cispo_cap, sapo_temperature_high, sapo_temperature_low, vespo_k_high, vespo_k_low,
    vespo_lambda_high, vespo_lambda_low, dppo_tv_bounds_high, dppo_tv_bounds_low, dppo_kl_bounds_high, dppo_kl_bounds_low,
    dppo_cap, max_response_tokens,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, SURROGATE: tl.constexpr, SEQUENCE_MEAN: tl.constexpr, COUNTS: tl.constexpr,
    BY_SEQUENCE: tl.constexpr, PER_TOKEN: tl.constexpr, KL_ESTIMATOR: tl.constexpr, KL_BIAS_CORRECTION: tl.constexpr,
    BEHAVIOUR: tl.constexpr, TRUNCATE: tl.constexpr, MASKS: tl.constexpr, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of sequence ``program_id(0)`` and its sums; the last program turns all sums into loss and metrics."""
    sequence = tl.program_id(0)
    exists = sequence < batch  # without any sequence there is one program, which finishes
    begin = tl.load(offsets + sequence, mask=exists, other=0)
    end = tl.load(offsets + sequence + 1, mask=exists, other=0)
    rollout_kept = exists
    if rollout_mask is not None:
        rollout_kept = exists & (tl.load(rollout_mask + sequence, mask=exists, other=0) != 0)
    sequence_advantage = 0.0
    if rewards is not None:
        sequence_advantage = advantage_of(
            sequence, rewards, group_offsets, rollout_mask, batch, groups, eps, BASELINE, SCALE, BLOCK
        )
    elif not PER_TOKEN:
        sequence_advantage = tl.load(advantages + sequence, mask=exists, other=0.0).to(tl.float32)
    tokens, log_ratio, log_behaviour, divergence, vespo_log_weight = sequence_sums(
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
        SURROGATE,
        BY_SEQUENCE,
        PER_TOKEN,
        BEHAVIOUR,
        TRUNCATE,
        MASKS,
        BLOCK,
    )
    divisor = tl.maximum(tokens, 1.0)
    sequence_weight, keep_others = sequence_weight_of(
        log_behaviour, divisor, behaviour_floor, behaviour_cap, geometric_floor, geometric_cap, BEHAVIOUR, TRUNCATE
    )
    divergence = divergence / divisor
    keep_negative = keep_others * zero_where(divergence > off_policy_delta, divergence)
    dppo_rise = dppo_tv_bounds_high if SURROGATE == "dppo_tv" else dppo_kl_bounds_high
    dppo_fall = dppo_tv_bounds_low if SURROGATE == "dppo_tv" else dppo_kl_bounds_low
    values, kls, entropies, ratios, ratio_max, clips_low, clips_high, masked, through = _token_pass(
        logprob, old, advantages, mask, ref, entropy, behaviour, weights, gradient,
        rollout_kept, begin, end, sequence_advantage, divisor, log_ratio / divisor, sequence_weight, keep_negative, keep_others,
        vespo_log_weight, lower, upper, clip_delta, kl_coef, behaviour_floor, behaviour_cap, cispo_cap, sapo_temperature_high,
        sapo_temperature_low, vespo_k_high, vespo_k_low, vespo_lambda_high, vespo_lambda_low, dppo_rise, dppo_fall, dppo_cap,
        SURROGATE, SEQUENCE_MEAN, BY_SEQUENCE, PER_TOKEN, KL_ESTIMATOR, KL_BIAS_CORRECTION, BEHAVIOUR, TRUNCATE, MASKS,
        HAS_DELTA, BLOCK,
    )  # fmt: skip
    if BY_SEQUENCE:
        add_through_ratio(
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
            SURROGATE,
            PER_TOKEN,
            BLOCK,
        )
    if exists:
        _store_sums(
            partial,
            sequence,
            batch,
            values,
            tokens,
            rollout_kept,
            kls,
            entropies,
            ratios,
            ratio_max,
            clips_low,
            clips_high,
            masked,
        )
    tl.debug_barrier()  # all of this program's sums are written before it counts as done
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        _finish(
            partial,
            batch,
            normalizer,
            entropy_normalizer,
            entropy_coef,
            max_response_tokens,
            loss,
            metrics,
            scales,
            COUNTS,
            FINISH_WIDTH,
        )
