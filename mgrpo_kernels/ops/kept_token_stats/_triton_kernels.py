"""Kernels of a head over kept sets. A program multiplies ENTRIES gathered rows at a time, COLUMNS of each, and sums in float32."""

import triton
import triton.language as tl

from mgrpo_kernels.ops._triton.kernels import narrow


@triton.jit
def gathered(weight, ids, place, inside, column, vocab, width, stride):
    """Return rows ``(ENTRIES, COLUMNS)`` of the weight in float32, and which of them there are. An id outside the weight is not read."""
    index = tl.load(ids + place, mask=inside, other=-1)
    there = (index >= 0) & (index < vocab)
    places = weight + index.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(places, mask=there[:, None] & (column < width)[None, :], other=0.0).to(tl.float32), there


@triton.jit
def logits_kernel(
    hidden,
    weight,
    ids,
    x,
    vocab,
    width,
    kept,
    hidden_stride,
    weight_stride,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the products of one row of `hidden` with ENTRIES of its rows of the weight; 0 where there is none."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < kept
    place = row * kept + entry
    total = tl.zeros([ENTRIES, COLUMNS], tl.float32)
    there = inside
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        h = tl.load(hidden + row * hidden_stride + column, mask=column < width, other=0.0).to(tl.float32)
        w, there = gathered(weight, ids, place, inside, column, vocab, width, weight_stride)
        total += h[None, :] * w
    tl.store(x + place, tl.where(there, tl.sum(total, 1), 0.0), mask=inside)


@triton.jit
def hidden_gradient_kernel(
    grad, weight, ids, out, vocab, width, kept, weight_stride, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write COLUMNS of one row of the gradient of `hidden`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ENTRIES, COLUMNS], tl.float32)
    for start in range(0, kept, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        inside = entry < kept
        place = row * kept + entry
        w, there = gathered(weight, ids, place, inside, column, vocab, width, weight_stride)
        total += tl.load(grad + place, mask=there, other=0.0)[:, None] * w
    tl.store(out + row * width + column, tl.sum(total, 0), mask=column < width)


@triton.jit
def weight_gradient_kernel(
    grad, hidden, order, bounds, out, bias, width, kept, hidden_stride, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write COLUMNS of the gradient of one row of the weight, which is the row's own: zeros where no token kept it."""
    index = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.load(bounds + index + 1)
    total = tl.zeros([ENTRIES, COLUMNS], tl.float32)
    of_bias = tl.zeros([ENTRIES], tl.float32)
    for start in range(tl.load(bounds + index), end, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        inside = entry < end
        place = tl.load(order + entry, mask=inside, other=0)
        g = tl.load(grad + place, mask=inside, other=0.0)
        places = hidden + (place // kept)[:, None] * hidden_stride + column[None, :]
        h = tl.load(places, mask=inside[:, None] & (column < width)[None, :], other=0.0).to(tl.float32)
        total += g[:, None] * h
        of_bias += g
    tl.store(out + index * width + column, narrow(tl.sum(total, 0), out.dtype.element_ty), mask=column < width)
    if bias is not None:  # noqa: SIM102 - decided when the kernel is compiled
        if tl.program_id(1) == 0:
            tl.store(bias + index, tl.sum(of_bias, 0))
