"""The kernel of the IQR filter: a program for each group."""

import triton
import triton.language as tl


@triton.jit
def _entropies(entropy, mask, i, end):
    """Return the entropies at i, and which of them are valid."""
    inside = i < end
    values = tl.load(entropy + i, mask=inside, other=float("nan"))
    valid = values == values  # noqa: PLR0124 - NaN
    if mask is not None:
        valid = valid & (tl.load(mask + i, mask=inside, other=0) != 0)
    return values, valid


@triton.jit
def _lerp(low, high, weight):
    """Interpolate from the nearer end, as torch.lerp."""
    near_low = weight < 0.5
    return tl.fma(tl.where(near_low, weight, weight - 1.0), high - low, tl.where(near_low, low, high))


@triton.jit(do_not_specialize=["batch"])
def filter_kernel(entropy, offsets, mask, keep, lower, q1, q3, k, batch, BLOCK: tl.constexpr):
    """Write a group's quartiles, found by ranks (equal values rank by position), and who stays."""
    group = tl.program_id(0)
    begin = tl.maximum(tl.load(offsets + group), 0)  # within the tensor, whatever the offsets hold
    end = tl.minimum(tl.load(offsets + group + 1), batch)
    lanes = tl.arange(0, BLOCK)
    valid_counts = tl.zeros([BLOCK], tl.int32)
    for first in range(begin, end, BLOCK):
        _, valid = _entropies(entropy, mask, first + lanes, end)
        valid_counts += valid.to(tl.int32)
    count = tl.sum(valid_counts, 0)
    last = tl.maximum(count - 1, 0)
    rank_1 = 0.25 * last.to(tl.float32)
    rank_3 = 0.75 * last.to(tl.float32)
    below_1 = tl.floor(rank_1)
    below_3 = tl.floor(rank_3)
    at_1 = below_1.to(tl.int32)
    at_3 = below_3.to(tl.int32)

    low_1 = tl.zeros([BLOCK], tl.float32)
    high_1 = tl.zeros([BLOCK], tl.float32)
    low_3 = tl.zeros([BLOCK], tl.float32)
    high_3 = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, end, BLOCK):
        i = first + lanes
        values, valid = _entropies(entropy, mask, i, end)
        rank = tl.zeros([BLOCK], tl.int32)
        for other_first in range(begin, end, BLOCK):
            j = other_first + lanes
            others, others_valid = _entropies(entropy, mask, j, end)
            less = others[None, :] < values[:, None]
            before = (others[None, :] == values[:, None]) & (j[None, :] < i[:, None])
            rank += tl.sum((others_valid[None, :] & (less | before)).to(tl.int32), 1)
        # Exactly one valid value has each rank.
        low_1 += tl.where(valid & (rank == at_1), values, 0.0)
        high_1 += tl.where(valid & (rank == tl.minimum(at_1 + 1, last)), values, 0.0)
        low_3 += tl.where(valid & (rank == at_3), values, 0.0)
        high_3 += tl.where(valid & (rank == tl.minimum(at_3 + 1, last)), values, 0.0)
    quartile_1 = _lerp(tl.sum(low_1, 0), tl.sum(high_1, 0), rank_1 - below_1)
    quartile_3 = _lerp(tl.sum(low_3, 0), tl.sum(high_3, 0), rank_3 - below_3)
    quartile_1 = tl.where(count > 0, quartile_1, float("nan"))
    quartile_3 = tl.where(count > 0, quartile_3, float("nan"))
    limit = quartile_1 - k * (quartile_3 - quartile_1)
    tl.store(q1 + group, quartile_1)
    tl.store(q3 + group, quartile_3)
    tl.store(lower + group, limit)
    for first in range(begin, end, BLOCK):
        i = first + lanes
        values, valid = _entropies(entropy, mask, i, end)
        tl.store(keep + i, (valid & (values >= limit)).to(tl.uint8), mask=i < end)
