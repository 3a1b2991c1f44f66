"""The advantage of one rollout over its group, which both kernels of _triton_kernels.py compute."""

import triton
import triton.language as tl


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
def advantage_of(
    rollout,
    rewards,
    offsets,
    rollout_mask,
    batch,
    groups,
    eps,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
    elif SCALE == "mean":
        centred = centred / (tl.abs(total / tl.maximum(number, 1.0)) + eps)
    # A NaN reward is neither highest nor lowest, but it is in the total.
    silent = (number < 2.0) | ((highest == lowest) & (total == total))  # noqa: PLR0124
    return tl.where(keep & (silent == 0), centred, 0.0)
