"""Kernels of the fused head with a matmul of their own: the tensor cores' tile of logits is folded into the statistics in registers.

Operands come through tensor descriptors: on Hopper and later the copy engine brings them (TMA) and whole warp groups multiply
(wgmma). A program takes one tile ``(BLOCK_M, BLOCK_N)`` of logits after another, neighbours at the same time, so that the rows and
weights they share are read from the L2 cache.
"""

import triton
import triton.language as tl

from mgrpo_kernels.ops._triton.kernels import LARGEST, LOG2_E, NEGLIGIBLE, merge_lanes, multiply, narrow
from mgrpo_kernels.ops.linear_token_stats._triton_kernels import all_zero, final, finished, fold, gradient

GROUP = tl.constexpr(8)  # tiles of rows that share the weights they read at one time


@triton.jit
def _place(tile, tiles_m, tiles_n):
    """Return row and column of the tile in the grid of tiles: down a group of rows first, then to the next column."""
    in_group = GROUP * tiles_n
    first = tile // in_group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + tile % in_group % height, tile % in_group // height


@triton.jit
def _logits(hidden, weight, row, column, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return float32 raw logits ``(BLOCK_M, BLOCK_N)``. Beyond the operands' ends the descriptors give zeros.

    A descriptor takes places of 32 bits and describes no more, so the casts lose nothing.
    """
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    row, column = tl.cast(row, tl.int32), tl.cast(column, tl.int32)
    for k in range(0, width, BLOCK_K):
        place = tl.cast(k, tl.int32)
        total = multiply(hidden.load([row, place]), weight.load([column, place]).T, total)
    return total


@triton.jit
def _label_columns(labels, row, there, first, columns):
    """Return the column of each row's label among these, or -1. In 32 bits: a tile is compared with them."""
    column = tl.load(labels + row, mask=there, other=-1).to(tl.int64) - first
    return tl.where((column >= 0) & (column < columns), column, -1).to(tl.int32)


@triton.jit(do_not_specialize=["first", "number"])
def state_kernel(
    hidden, weight, bias, labels, temperature, out, states,
    scale, logit_scale, softcap, first, number, columns, width, out_stride,
    WANT_EXPZ: tl.constexpr, WANT_SUM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the states of tiles of columns, ``(tiles, 5, number)``, and with `out` ``(number, columns)`` the raw logits too.

    Of the sums, SUM_EXPZ and SUM are written where they are wanted.
    """
    tiles_m = tl.cdiv(number, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        m, n = _place(tile, tiles_m, tiles_n)
        raw = _logits(hidden, weight, m * BLOCK_M, n * BLOCK_N, width, BLOCK_M, BLOCK_N, BLOCK_K)
        row = m * BLOCK_M + tl.arange(0, BLOCK_M)
        there = row < number
        column = n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        inside = column < columns
        if out is not None:
            # The statistics are of what is stored: the gradient will be formed from it.
            stored = narrow(raw, out.dtype.element_ty)
            places = out + row.to(tl.int64)[:, None] * out_stride + column
            tl.store(places, stored, mask=there[:, None] & inside)
            raw = stored.to(tl.float32)
        inverse = scale
        if temperature is not None:
            inverse = (scale / tl.load(temperature + row, mask=there, other=1.0))[:, None]
        z, _ = final(raw, bias, column, inside, logit_scale, softcap, inverse)
        state = states + n.to(tl.int64) * 5 * number + row
        if WANT_SUM:
            tl.store(state + 3 * number, tl.sum(tl.where(inside, z, 0.0), 1), mask=there)
        label = tl.zeros([BLOCK_M], tl.float32)
        if labels is not None:
            hit = _label_columns(labels, row, there, first, columns)
            near = (hit >= n * BLOCK_N) & (hit < (n + 1) * BLOCK_N)
            if tl.max(near.to(tl.int32), 0) > 0:  # nearly all tiles have no row's label
                label = tl.sum(tl.where(column == hit[:, None], z, 0.0), 1)
        tl.store(state + 4 * number, label, mask=there)
        z = tl.where(inside, z, float("-inf"))
        maximum = tl.minimum(tl.maximum(tl.max(z, 1), -LARGEST), LARGEST)
        u = (z - maximum[:, None]) * LOG2_E
        power = tl.exp2(u)
        tl.store(state, maximum, mask=there)
        tl.store(state + number, tl.sum(power, 1), mask=there)
        if WANT_EXPZ:
            tl.store(state + 2 * number, tl.sum(power * tl.maximum(u, NEGLIGIBLE), 1), mask=there)


@triton.jit(do_not_specialize=["number", "tiles", "state_stride"])
def merge_kernel(
    states, state, number, tiles, columns, state_stride, state_row_stride,
    WANT_EXPZ: tl.constexpr, WANT_SUM: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Fold the states of tiles of columns into `state` ``(6, number)``, in one fixed order. A program takes ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < number
    maximum = tl.full([PARTS, ROWS], -LARGEST, tl.float32)
    sum_exp = tl.zeros([PARTS, ROWS], tl.float32)
    sum_expz = tl.zeros([PARTS, ROWS], tl.float32)
    total = tl.zeros([PARTS, ROWS], tl.float32)
    label = tl.zeros([PARTS, ROWS], tl.float32)
    for start in range(0, tiles, PARTS):
        tile = start + tl.arange(0, PARTS)[:, None]
        inside = (tile < tiles) & there[None, :]
        place = states + tile.to(tl.int64) * 5 * number + row[None, :]
        part_maximum = tl.load(place, mask=inside, other=-LARGEST)
        part_exp = tl.load(place + number, mask=inside, other=0.0)
        if WANT_SUM:
            total += tl.load(place + 3 * number, mask=inside, other=0.0)
        label += tl.load(place + 4 * number, mask=inside, other=0.0)
        new = tl.maximum(maximum, part_maximum)
        shift = tl.maximum((maximum - new) * LOG2_E, NEGLIGIBLE)
        part_shift = tl.maximum((part_maximum - new) * LOG2_E, NEGLIGIBLE)
        by, part_by = tl.exp2(shift), tl.exp2(part_shift)
        if WANT_EXPZ:
            part_expz = tl.load(place + 2 * number, mask=inside, other=0.0)
            sum_expz = by * (sum_expz + sum_exp * shift) + part_by * (part_expz + part_exp * part_shift)
        sum_exp = by * sum_exp + part_by * part_exp
        maximum = new
    row_maximum, row_exp, row_expz = merge_lanes(LOG2_E, maximum, sum_exp, sum_expz)
    place = state + row.to(tl.int64) * state_row_stride
    row_total = tl.sum(total, 0)
    fold(place, state_stride, row_maximum, row_exp, row_expz, row_total, columns, there, WANT_EXPZ, WANT_SUM)
    tl.store(place + 4 * state_stride, tl.load(place + 4 * state_stride, mask=there) + tl.sum(label, 0), mask=there)


@triton.jit(do_not_specialize=["first", "number", "coefficient_stride"])
def gradient_kernel(
    hidden, weight, bias, labels, temperature, out, coefficients, logsumexp,
    scale, logit_scale, softcap, first, number, columns, width, out_stride, coefficient_stride, coefficient_row_stride,
    WANT_BETA: tl.constexpr, WANT_GAMMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the logits into `out` ``(number, columns)``; the logits themselves are never stored."""
    tiles_m = tl.cdiv(number, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        m, n = _place(tile, tiles_m, tiles_n)
        raw = _logits(hidden, weight, m * BLOCK_M, n * BLOCK_N, width, BLOCK_M, BLOCK_N, BLOCK_K)
        row = m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        there = row < number
        column = n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        inside = column < columns
        inverse = scale
        if temperature is not None:
            inverse = scale / tl.load(temperature + row, mask=there, other=1.0)
        place = coefficients + row.to(tl.int64) * coefficient_row_stride
        alpha = tl.load(place, mask=there, other=0.0)
        beta = tl.load(place + coefficient_stride, mask=there, other=0.0) if WANT_BETA else None
        gamma = tl.load(place + 2 * coefficient_stride, mask=there, other=0.0) if WANT_GAMMA else None
        delta = tl.load(place + 3 * coefficient_stride, mask=there, other=0.0) if labels is not None else None
        lse = tl.load(logsumexp + row, mask=there, other=0.0)
        z, slope = final(raw, bias, column, inside, logit_scale, softcap, inverse)
        grad = gradient(z, alpha, beta, gamma, lse)
        if labels is not None:
            # Every element is compared: with a branch, as in the state, the tile of gradients spills on sm_80 and sm_100.
            grad = tl.where(column == _label_columns(labels, row, there, first, columns), grad + delta, grad)
        masked = all_zero(alpha, beta, gamma, delta)  # its logits may be anything
        grad = tl.where(masked, 0.0, finished(grad, z, slope, inverse * logit_scale))
        tl.store(out + row.to(tl.int64) * out_stride + column, narrow(grad, out.dtype.element_ty), mask=there & inside)
