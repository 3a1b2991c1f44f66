"""Kernels of gradients to a tolerance: the largest logits of each row, and which of them are needed. A program takes one row."""

import triton
import triton.language as tl

from mgrpo_kernels.ops._triton.kernels import LN_2, LOG2_E, NEGLIGIBLE
from mgrpo_kernels.ops.linear_token_stats._triton_kernels import all_zero, final, finished, gradient

# Of the probability beside the largest, the least that bounds are taken from. A float32 sum resolves 1e-7, but the gradient of a row that
# is sure of its token, and so what may be left out of it, is smaller than that.
LEAST_BESIDE = tl.constexpr(1e-12)
FLAT = tl.constexpr(4.0)  # nats
CLASS_SHIFT = tl.constexpr(20)  # a float's bits from here on name its class: eight to a factor of 2
CLASSES = tl.constexpr(2048)
HALVINGS = tl.constexpr(11)  # of the classes


@triton.jit
def _powers(z, counts, maximum):
    """Return 2^u and u 2^u, u = (z - maximum) / log 2, of what counts; 0 for all else."""
    u = tl.where(counts, z - maximum, float("-inf")) * LOG2_E
    power = tl.exp2(u)
    return power, power * tl.maximum(u, NEGLIGIBLE)


@triton.jit
def _keep_above(ids, logits, count, bound, maximum, sum_exp, sum_expz, BLOCK: tl.constexpr):
    """Remove the listed logits that are not above the bound; return how many are left, and the sums with the others' _powers."""
    kept = 1
    tl.debug_barrier()  # what other threads have listed is read here
    for start in range(1, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        there = place < count
        z = tl.load(logits + place, mask=there, other=0.0)
        column = tl.load(ids + place, mask=there, other=0)
        stays = there & (z > bound)
        tl.debug_barrier()  # no thread overwrites what another has still to read
        to = kept + tl.cumsum(stays.to(tl.int32), 0) - 1
        tl.store(logits + to, z, mask=stays)
        tl.store(ids + to, column, mask=stays)
        kept += tl.sum(stays.to(tl.int32), 0)
        power, powerz = _powers(z, there & (z <= bound), maximum)
        sum_exp += power
        sum_expz += powerz
    tl.debug_barrier()
    return kept, sum_exp, sum_expz


@triton.jit(do_not_specialize=["first", "start", "state_stride", "rest_stride", "smallest"])
def top_kernel(
    x, bias, labels, temperature, state, ids, logits, counts, rest,
    scale, logit_scale, softcap, first, start, width, row_stride, state_stride, state_row_stride, rest_stride, smallest,
    ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """List the largest logits of a row of a tile ``(n, width)``, rows `start` and on of the weight, and sum up the others into `rest`.

    The row's state already holds this tile. Listed is what exceeds a bound that only rises: `smallest` times the probability beside the
    row's largest, or more where the row of the list would overflow. Place 0 of the list is the label's.
    """
    row = tl.program_id(0).to(tl.int64)
    inverse = scale if temperature is None else scale / tl.load(temperature + row)
    x += row * row_stride
    ids += row * ROOM
    logits += row * ROOM
    rest += row
    place = state + row * state_row_stride
    maximum = tl.load(place)
    state_exp = tl.load(place + state_stride)
    count = tl.load(counts + row)
    bound = tl.maximum(
        tl.load(rest + 3 * rest_stride), maximum + tl.log(tl.maximum(state_exp - 1.0, LEAST_BESIDE) * smallest)
    )
    bound = tl.where(state_exp == state_exp, bound, float("inf"))  # noqa: PLR0124 - of a row with a NaN nothing is listed
    if labels is not None:
        hit = tl.load(labels + row).to(tl.int64) - first
        there = (hit >= 0) & (hit < width)
        at_label = tl.load(x + hit, mask=there, other=0.0)
        z_label, _slope = final(at_label, bias, hit, there, logit_scale, softcap, inverse)
        tl.store(ids, (start + hit).to(tl.int32), mask=there)
        tl.store(logits, z_label, mask=there)
    sum_exp = tl.zeros([BLOCK], tl.float32)
    sum_expz = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < width
        raw = tl.load(x + column, mask=inside, other=0.0)
        z, _slopes = final(raw, bias, column, inside, logit_scale, softcap, inverse)
        above = (inside & (z > bound)).to(tl.int32)
        number = tl.sum(above, 0)
        if number > 0:
            while count + number > ROOM:
                # An eighth of the way to the largest, but of a row whose list is too long with nearly flat logits none stays.
                raised = bound + 0.125 * (maximum - bound)
                bound = tl.where((raised > bound) & (maximum - bound > FLAT), raised, float("inf"))
                count, sum_exp, sum_expz = _keep_above(ids, logits, count, bound, maximum, sum_exp, sum_expz, BLOCK)
                above = (inside & (z > bound)).to(tl.int32)
                number = tl.sum(above, 0)
            to = count + tl.cumsum(above, 0) - 1
            tl.store(ids + to, start + column, mask=above > 0)
            tl.store(logits + to, z, mask=above > 0)
            count += number
        power, powerz = _powers(z, inside & (above == 0), maximum)
        sum_exp += power
        sum_expz += powerz
    tl.store(counts + row, count)
    shift = tl.maximum(tl.load(rest) - maximum, NEGLIGIBLE)
    rescale = tl.exp(shift)
    rest_exp = tl.load(rest + rest_stride)
    rest_expz = rescale * (tl.load(rest + 2 * rest_stride) + rest_exp * shift)
    tl.store(rest, maximum)
    tl.store(rest + rest_stride, rescale * rest_exp + tl.sum(sum_exp, 0))
    tl.store(rest + 2 * rest_stride, rest_expz + LN_2 * tl.sum(sum_expz, 0))
    tl.store(rest + 3 * rest_stride, tl.minimum(bound, maximum))  # later tiles may have larger ones


@triton.jit
def _not_listed(rest, stride, alpha, beta, lse):
    """Return a bound of the absolute gradient of all final logits that are not listed: sum p (|alpha| + |beta log p|)."""
    shift = tl.load(rest) - lse
    sum_exp = tl.load(rest + stride)
    scale = tl.exp(shift)
    of_log = -scale * (tl.load(rest + 2 * stride) + shift * sum_exp)
    return tl.where(sum_exp == 0.0, 0.0, tl.abs(alpha) * scale * sum_exp + tl.abs(beta) * of_log)


@triton.jit(do_not_specialize=["outside", "rest_stride", "coefficient_stride", "tolerance"])
def select_kernel(
    ids, logits, counts, rest, coefficients, logsumexp, temperature, needed, least,
    scale, logit_scale, softcap, outside, room, rest_stride, coefficient_stride, coefficient_row_stride, tolerance,
    ROOM: tl.constexpr,
):  # fmt: skip
    """Write to `needed` as few of a row's listed entries as keep the rest of its absolute gradient below the tolerance.

    It is within an eighth of the size of the smallest; 0 for a row without a gradient, and `outside` for one that cannot be held to
    the tolerance with what is listed. `least` of each of the row's entries falls to that number. The least of several is the same in
    any order, so atomic operations give the same bits every time.
    """
    row = tl.program_id(0).to(tl.int64)
    place = coefficients + row * coefficient_row_stride
    alpha = tl.load(place)
    beta = tl.load(place + coefficient_stride)
    gamma = tl.load(place + 2 * coefficient_stride)
    delta = tl.load(place + 3 * coefficient_stride)
    if all_zero(alpha, beta, gamma, delta):
        tl.store(needed + row, 0)
        return
    inverse = scale if temperature is None else scale / tl.load(temperature + row)
    lse = tl.load(logsumexp + row)
    at = tl.arange(0, ROOM)
    there = at < tl.load(counts + row)
    z = tl.load(logits + row * room + at, mask=there, other=0.0)
    column = tl.load(ids + row * room + at, mask=there, other=0)
    label = tl.load(ids + row * room)  # the list may hold it once more
    there &= tl.where(at == 0, label >= 0, column != label)
    slope = 1.0
    if softcap is not None:
        bent = z / (softcap * inverse)
        slope = 1.0 - bent * bent
    grad = gradient(z, alpha, beta, None, lse) + tl.where(at == 0, delta, 0.0)
    magnitude = tl.where(there, tl.abs(finished(grad, z, slope, inverse * logit_scale)), 0.0)
    left = tl.abs(logit_scale * inverse) * _not_listed(rest + row, rest_stride, alpha, beta, lse)
    budget = tolerance * tl.sum(magnitude, 0) - left
    # NaN compares as false: such a row is computed in full, and shows it.
    fits = (budget >= 0.0) & (budget < float("inf")) & (gamma == 0.0)
    of_class = magnitude.to(tl.int32, bitcast=True) >> CLASS_SHIFT
    low = 0
    high = CLASSES
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        out = tl.sum(tl.where((at > 0) & (of_class < middle), magnitude, 0.0), 0)
        low = tl.where(out <= budget, middle, low)
        high = tl.where(out <= budget, high, middle)
    kept = there & ((at == 0) | (of_class >= low))
    number = tl.sum(kept.to(tl.int32), 0)
    tl.store(needed + row, tl.where(fits, number, outside))
    tl.atomic_min(least + column, number, mask=tl.where(fits, kept, False), sem="relaxed")
