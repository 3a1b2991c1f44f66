"""Functions that several kernels call: the online softmax of a row, and what triton's language lacks."""

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32
LOG2_E = tl.constexpr(1.4426950408889634)
TWO_LOG2_E = tl.constexpr(2.8853900817779268)
LN_2 = tl.constexpr(0.6931471805599453)
NEGLIGIBLE = tl.constexpr(-1000.0)  # 2 to this power is 0, and 0 times it is 0 too


@triton.jit
def empty_lanes(LANES: tl.constexpr):
    """Return the lanes' state before the first tile: maximum of x, sum of 2^u, sum of u 2^u; u = (x - maximum) unit."""
    return tl.full([LANES], -LARGEST, tl.float32), tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)


@triton.jit
def add_tile(x, unit, maximum, sum_exp, sum_expz, WANT_EXPZ: tl.constexpr):
    """Fold x ``(STEPS, LANES)`` into the lanes' state. `unit` > 0 makes x a power of 2; an x of -inf counts nothing.

    Each lane keeps a maximum of its own: nothing crosses threads before the row ends, and moving the maximum costs one
    exponential for STEPS elements. Between -LARGEST and LARGEST it needs no special case: of -inf alone the sums stay
    0, +inf makes sum_exp inf, and NaN makes it NaN.
    """
    new = tl.minimum(tl.maximum(maximum, tl.max(x, 0)), LARGEST)
    shift = tl.maximum((maximum - new) * unit, NEGLIGIBLE)
    scale = tl.exp2(shift)
    u = (x - new[None, :]) * unit
    power = tl.exp2(u)
    if WANT_EXPZ:
        sum_expz = scale * (sum_expz + sum_exp * shift) + tl.sum(power * tl.maximum(u, NEGLIGIBLE), 0)
    return new, sum_exp * scale + tl.sum(power, 0), sum_expz


@triton.jit
def merge_lanes(unit, maximum, sum_exp, sum_expz):
    """Return the lanes' state as one, of scalars."""
    highest = tl.max(maximum, 0)
    shift = tl.maximum((maximum - highest) * unit, NEGLIGIBLE)
    scale = tl.exp2(shift)
    return highest, tl.sum(sum_exp * scale, 0), tl.sum(scale * (sum_expz + sum_exp * shift), 0)


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent. Near 0, where 1 - e^2x would cancel, it is a fitted polynomial."""
    square = x * x
    small = -0.006615746616919217 * square + 0.021312738999139023
    small = small * square - 0.0539100652660716
    small = small * square + 0.1333311760620056
    small = small * square - 0.33333332044970315
    small = x + x * square * small
    large = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * TWO_LOG2_E) + 1.0)
    return tl.where(tl.abs(x) < 0.55, small, tl.where(x < 0, -large, large))


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Return float32 x rounded to the nearest `dtype`. The interpreter's own cast to bfloat16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        raw = x.to(tl.int32, bitcast=True)
        raw = tl.where(x == x, (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16, 0x7FC0)  # noqa: PLR0124 - NaN
        return raw.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


INTERPRETED = tl.constexpr(not isinstance(narrow, triton.JITFunction))


@triton.jit
def multiply(a, b, total):
    """Return total + a @ b in float32. The interpreter holds bfloat16 as integers, and would multiply those."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total)


@triton.jit
def clamp(x, low, high):
    """Return x between low and high. NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))
