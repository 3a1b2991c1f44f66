"""Kernels of the fused head between the library's matmuls: what happens to a tile of raw logits. A program takes one row."""

import triton
import triton.language as tl

from mgrpo_kernels.ops._triton.kernels import (
    LN_2,
    LOG2_E,
    NEGLIGIBLE,
    add_tile,
    empty_lanes,
    merge_lanes,
    narrow,
    tanh,
)


@triton.jit
def final(raw, bias, column, inside, logit_scale, softcap, inverse):
    """Return final logits z of raw ones, and the slope of softcap's tanh. Softcap of None: none, and slope 1."""
    y = raw.to(tl.float32)
    if bias is not None:
        y += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if softcap is not None:
        bent = tanh(y * logit_scale * (1.0 / softcap))
        return softcap * bent * inverse, 1.0 - bent * bent
    else:
        return y * (logit_scale * inverse), 1.0


@triton.jit
def fold(
    place, stride, maximum, sum_exp, sum_expz, total, count, inside, WANT_EXPZ: tl.constexpr, WANT_SUM: tl.constexpr
):
    """Fold the state of some columns, sum_expz in units of log 2, into rows of MAX, SUM_EXP, SUM_EXPZ, SUM, LABEL, COUNT."""
    sum_exp = tl.where(sum_exp == float("inf"), float("nan"), sum_exp)  # +inf among the logits
    old_maximum = tl.load(place, mask=inside)
    old_exp = tl.load(place + stride, mask=inside)
    new_maximum = tl.maximum(old_maximum, maximum)
    old_shift = tl.maximum(old_maximum - new_maximum, NEGLIGIBLE)
    old_scale = tl.exp(old_shift)
    shift = tl.maximum(maximum - new_maximum, NEGLIGIBLE)
    scale = tl.exp(shift)
    tl.store(place, new_maximum, mask=inside)
    tl.store(place + stride, old_exp * old_scale + sum_exp * scale, mask=inside)
    if WANT_EXPZ:
        expz = old_scale * (tl.load(place + 2 * stride, mask=inside) + old_exp * old_shift)
        tl.store(place + 2 * stride, expz + scale * (LN_2 * sum_expz + sum_exp * shift), mask=inside)
    if WANT_SUM:
        tl.store(place + 3 * stride, tl.load(place + 3 * stride, mask=inside) + total, mask=inside)
    tl.store(place + 5 * stride, tl.load(place + 5 * stride, mask=inside) + count, mask=inside)


@triton.jit
def gradient(z, alpha, beta, gamma, lse):
    """Return the gradient of final logits z, without what the label adds and the head's slope. A coefficient of None is 0."""
    logp = z - lse
    p = tl.exp2(logp * LOG2_E)
    grad = p * alpha if beta is None else p * (alpha + beta * tl.maximum(logp, NEGLIGIBLE))
    return grad if gamma is None else grad + gamma


@triton.jit
def finished(grad, z, slope, factor):
    """Return the gradient of raw logits from that of final ones z: times `factor` and softcap's slope, and 0 where z is impossible."""
    return tl.where(z == float("-inf"), 0.0, grad * (factor * slope))


@triton.jit
def all_zero(alpha, beta, gamma, delta):
    """Return whether these coefficients, of which None is 0, leave a row without gradient."""
    zero = alpha == 0.0
    if beta is not None:
        zero &= beta == 0.0
    if gamma is not None:
        zero &= gamma == 0.0
    if delta is not None:
        zero &= delta == 0.0
    return zero


@triton.jit(do_not_specialize=["first", "state_stride"])  # they change from tile to tile, or with the number of rows
def state_kernel(
    x,
    bias,
    labels,
    temperature,
    state,
    scale,
    logit_scale,
    softcap,
    first,
    width,
    row_stride,
    state_stride,
    state_row_stride,
    PLAIN: tl.constexpr,
    WANT_EXPZ: tl.constexpr,
    WANT_SUM: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Fold a row of a tile ``(n, width)``, vocabulary entries `first` and on, into its state, a column of ``(6, n)``.

    PLAIN says that final logits are raw ones times a positive number: then the row's sums take that factor, not its elements. Of the
    sums, SUM_EXPZ and SUM are formed where they are wanted.
    """
    row = tl.program_id(0).to(tl.int64)
    inverse = scale if temperature is None else scale / tl.load(temperature + row)
    factor = inverse * logit_scale if PLAIN else 1.0
    unit = factor * LOG2_E
    x += row * row_stride
    maximum, sum_exp, sum_expz = empty_lanes(LANES)
    total = tl.zeros([LANES], tl.float32)
    columns = tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(0, width, STEPS * LANES):
        column = start + columns
        inside = column < width
        z = tl.load(x + column, mask=inside, other=0.0 if WANT_SUM else float("-inf")).to(tl.float32)
        if not PLAIN:
            z, _ = final(z, bias, column, inside, logit_scale, softcap, inverse)
        if WANT_SUM:
            total += tl.sum(z if PLAIN else tl.where(inside, z, 0.0), 0)
        if WANT_SUM or not PLAIN:
            z = tl.where(inside, z, float("-inf"))
        maximum, sum_exp, sum_expz = add_tile(z, unit, maximum, sum_exp, sum_expz, WANT_EXPZ)
    tile_maximum, tile_exp, tile_expz = merge_lanes(unit, maximum, sum_exp, sum_expz)
    place = state + row * state_row_stride
    tile_total = tl.sum(total, 0) * factor
    fold(place, state_stride, tile_maximum * factor, tile_exp, tile_expz, tile_total, width, None, WANT_EXPZ, WANT_SUM)
    if labels is not None:
        column = tl.load(labels + row).to(tl.int64) - first
        there = (column >= 0) & (column < width)
        raw = tl.load(x + column, mask=there, other=0.0)
        z, _ = final(raw, bias, column, there, logit_scale, softcap, inverse)
        tl.store(place + 4 * state_stride, tl.load(place + 4 * state_stride) + tl.where(there, z, 0.0))


@triton.jit(do_not_specialize=["first", "coefficient_stride"])
def gradient_kernel(
    x, out, bias, labels, temperature, coefficients, logsumexp,
    scale, logit_scale, softcap, first, width, row_stride, out_stride, coefficient_stride, coefficient_row_stride,
    WANT_BETA: tl.constexpr, WANT_GAMMA: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a row of a tile of raw logits to `out`, which may be the tile itself.

    The coefficients beta and gamma are read where they are wanted, and delta where there are labels; elsewhere they are 0. No element is
    compared with the label: its own gradient is written last, to its place alone.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    out += row * out_stride
    place = coefficients + row * coefficient_row_stride
    alpha = tl.load(place)
    beta = tl.load(place + coefficient_stride) if WANT_BETA else None
    gamma = tl.load(place + 2 * coefficient_stride) if WANT_GAMMA else None
    delta = tl.load(place + 3 * coefficient_stride) if labels is not None else None
    columns = tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    if all_zero(alpha, beta, gamma, delta):  # masked: nothing of it is read
        zeros = tl.zeros([STEPS, LANES], out.dtype.element_ty)
        for start in range(0, width, STEPS * LANES):
            tl.store(out + start + columns, zeros, mask=start + columns < width)
        return
    inverse = scale if temperature is None else scale / tl.load(temperature + row)
    lse = tl.load(logsumexp + row)
    factor = inverse * logit_scale
    if labels is not None:
        hit = tl.load(labels + row).to(tl.int64) - first
        there = (hit >= 0) & (hit < width)
        raw = tl.load(x + hit, mask=there, other=0.0)
        z_label, slope_label = final(raw, bias, hit, there, logit_scale, softcap, inverse)
        at_label = finished(gradient(z_label, alpha, beta, gamma, lse) + delta, z_label, slope_label, factor)
        tl.debug_barrier()  # no thread overwrites the label's logit, where `out` is x, before every other has read it
    for start in range(0, width, STEPS * LANES):
        column = start + columns
        inside = column < width
        z, slope = final(
            tl.load(x + column, mask=inside, other=0.0), bias, column, inside, logit_scale, softcap, inverse
        )
        grad = finished(gradient(z, alpha, beta, gamma, lse), z, slope, factor)
        tl.store(out + column, narrow(grad, out.dtype.element_ty), mask=inside)
    if labels is not None:
        tl.debug_barrier()  # after the store of the thread that has the label among its elements
        tl.store(out + hit, narrow(at_label, out.dtype.element_ty), mask=there)
