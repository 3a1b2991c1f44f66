"""Kernels of the token statistics. A program holds a row of logits, or a part of one. Pointers of None are unwanted."""

import triton
import triton.language as tl

from mgrpo_kernels.ops._triton.kernels import LN_2, LOG2_E, add_tile, empty_lanes, merge_lanes, narrow


@triton.jit
def _row_start(row, inner, outer_stride, inner_stride):
    """Return the first element of a row, counted in int64: rows times V passes 2^31 soon.

    The strides are cast by `tl.cast`, because an argument that is 1 reaches the kernel as a constexpr, which has no method `to`.
    """
    return (row // inner) * tl.cast(outer_stride, tl.int64) + (row % inner) * tl.cast(inner_stride, tl.int64)


@triton.jit
def _inverse(scale, temperature, row):
    return scale if temperature is None else scale / tl.load(temperature + row)


@triton.jit
def _write_row(
    row,
    x,
    inverse,
    maximum,
    sum_exp,
    sum_expz,
    total,
    vocab,
    labels,
    number_of_labels,
    logprob,
    entropy,
    self_certainty,
    logsumexp,
    BLOCK_K: tl.constexpr,
):
    """Write the statistics of a row that starts at pointer x, from its state."""
    log_sum = tl.log(sum_exp)
    tl.store(logsumexp + row, maximum * inverse + log_sum)
    if entropy is not None:
        tl.store(entropy + row, log_sum - LN_2 * (sum_expz / sum_exp))
    if self_certainty is not None:
        tl.store(self_certainty + row, (maximum - total / vocab) * inverse + log_sum)
    if logprob is not None:
        offset = tl.where(log_sum == float("inf"), float("nan"), log_sum)  # a row with +inf has no log-probs
        for first in range(0, number_of_labels, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            there = k < number_of_labels
            label = tl.load(labels + row * number_of_labels + k, mask=there, other=0).to(tl.int64)
            inside = (label >= 0) & (label < vocab)
            picked = tl.load(x + label, mask=there & inside, other=0.0).to(tl.float32)
            result = tl.where(inside, (picked - maximum) * inverse - offset, float("nan"))
            tl.store(logprob + row * number_of_labels + k, result, mask=there)


@triton.jit
def _write_masked_row(row, number_of_labels, logprob, entropy, self_certainty, logsumexp, BLOCK_K: tl.constexpr):
    tl.store(logsumexp + row, 0.0)
    if entropy is not None:
        tl.store(entropy + row, 0.0)
    if self_certainty is not None:
        tl.store(self_certainty + row, 0.0)
    if logprob is not None:
        for first in range(0, number_of_labels, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            tl.store(logprob + row * number_of_labels + k, tl.zeros([BLOCK_K], tl.float32), mask=k < number_of_labels)


@triton.jit(do_not_specialize=["inner"])  # the number of rows, mostly
def forward_kernel(
    logits, labels, mask, temperature, scale,
    logprob, entropy, self_certainty, logsumexp, states,
    vocab, part, number_of_labels, inner, outer_stride, inner_stride,
    STEPS: tl.constexpr, LANES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write a row's statistics; or, with `states` ``(rows, parts, 4)``, the state of part ``program_id(1)`` of it."""
    row = tl.program_id(0).to(tl.int64)
    if mask is not None and tl.load(mask + row) == 0:
        if states is None:
            _write_masked_row(row, number_of_labels, logprob, entropy, self_certainty, logsumexp, BLOCK_K)
        return
    x = logits + _row_start(row, inner, outer_stride, inner_stride)
    inverse = _inverse(scale, temperature, row)
    unit = inverse * LOG2_E
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, vocab)
    maximum, sum_exp, sum_expz = empty_lanes(LANES)
    total = tl.zeros([LANES], tl.float32)
    columns = tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(begin, end, STEPS * LANES):
        inside = start + columns < vocab
        tile = tl.load(x + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        maximum, sum_exp, sum_expz = add_tile(tile, unit, maximum, sum_exp, sum_expz, entropy is not None)
        if self_certainty is not None:
            total += tl.sum(tl.where(inside, tile, 0.0), 0)
    row_maximum, row_exp, row_expz = merge_lanes(unit, maximum, sum_exp, sum_expz)
    row_total = tl.sum(total, 0)
    if states is None:
        _write_row(
            row,
            x,
            inverse,
            row_maximum,
            row_exp,
            row_expz,
            row_total,
            vocab,
            labels,
            number_of_labels,
            logprob,
            entropy,
            self_certainty,
            logsumexp,
            BLOCK_K,
        )
    else:
        state = states + (row * tl.num_programs(1) + tl.program_id(1)) * 4
        tl.store(state, row_maximum)
        tl.store(state + 1, row_exp)
        tl.store(state + 2, row_expz)
        tl.store(state + 3, row_total)


@triton.jit(do_not_specialize=["inner", "parts"])
def merge_kernel(
    logits,
    labels,
    mask,
    temperature,
    scale,
    logprob,
    entropy,
    self_certainty,
    logsumexp,
    states,
    vocab,
    parts,
    number_of_labels,
    inner,
    outer_stride,
    inner_stride,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write a row's statistics from the states of its parts, which are merged in one fixed order."""
    row = tl.program_id(0).to(tl.int64)
    if mask is not None and tl.load(mask + row) == 0:
        _write_masked_row(row, number_of_labels, logprob, entropy, self_certainty, logsumexp, BLOCK_K)
        return
    inverse = _inverse(scale, temperature, row)
    i = tl.arange(0, PARTS)
    state = states + (row * parts + i) * 4
    maximum = tl.load(state, mask=i < parts, other=float("-inf"))
    sum_exp = tl.load(state + 1, mask=i < parts, other=0.0)
    sum_expz = tl.load(state + 2, mask=i < parts, other=0.0)
    total = tl.load(state + 3, mask=i < parts, other=0.0)
    row_maximum, row_exp, row_expz = merge_lanes(inverse * LOG2_E, maximum, sum_exp, sum_expz)
    _write_row(
        row,
        logits + _row_start(row, inner, outer_stride, inner_stride),
        inverse,
        row_maximum,
        row_exp,
        row_expz,
        tl.sum(total, 0),
        vocab,
        labels,
        number_of_labels,
        logprob,
        entropy,
        self_certainty,
        logsumexp,
        BLOCK_K,
    )


@triton.jit(do_not_specialize=["inner", "out_inner"])
def backward_kernel(
    logits, out, labels, mask, temperature, scale,
    grad_logprob, grad_entropy, grad_self_certainty, logsumexp, entropy,
    vocab, part, number_of_labels,
    inner, outer_stride, inner_stride, out_inner, out_outer_stride, out_inner_stride,
    STEPS: tl.constexpr, LANES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the gradient of part ``program_id(1)`` of a row. A thread writes what it has read: in place is fine."""
    row = tl.program_id(0).to(tl.int64)
    x = logits + _row_start(row, inner, outer_stride, inner_stride)
    y = out + _row_start(row, out_inner, out_outer_stride, out_inner_stride)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, vocab)
    columns = tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    if mask is not None and tl.load(mask + row) == 0:
        zeros = tl.zeros([STEPS, LANES], y.dtype.element_ty)
        for start in range(begin, end, STEPS * LANES):
            tl.store(y + start + columns, zeros, mask=start + columns < vocab)
        return
    inverse = _inverse(scale, temperature, row)
    lse = tl.load(logsumexp + row)
    by_p = 0.0  # coefficient of p_j
    by_one = 0.0
    by_surprise = 0.0  # coefficient of p_j (log p_j + entropy)
    row_entropy = 0.0
    if grad_logprob is not None:
        for first in range(0, number_of_labels, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            by_p -= tl.sum(tl.load(grad_logprob + row * number_of_labels + k, mask=k < number_of_labels, other=0.0), 0)
    if grad_self_certainty is not None:
        by_one = tl.load(grad_self_certainty + row)
        by_p += by_one
        by_one = -by_one / vocab
    if grad_entropy is not None:
        by_surprise = -tl.load(grad_entropy + row)
        row_entropy = tl.load(entropy + row)
    for start in range(begin, end, STEPS * LANES):
        inside = start + columns < vocab
        tile = tl.load(x + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        logp = tile * inverse - lse
        p = tl.exp2(logp * LOG2_E)
        grad = p * by_p + by_one
        if grad_entropy is not None:
            grad += tl.where(logp == float("-inf"), 0.0, by_surprise * (p * (logp + row_entropy)))
        if grad_logprob is not None:
            for k in range(number_of_labels):
                label = tl.load(labels + row * number_of_labels + k).to(tl.int64)
                column = tl.minimum(tl.maximum(label, 0), vocab - 1)
                if (column >= start) & (
                    column < start + STEPS * LANES
                ):  # uniform: labels elsewhere cost the tile nothing
                    hit = tl.load(grad_logprob + row * number_of_labels + k)
                    hit = tl.where(column == label, hit, float("nan"))
                    grad += tl.where(start + columns == column, hit, 0.0)
        grad = tl.where(tile == float("-inf"), 0.0, grad * inverse)
        tl.store(y + start + columns, narrow(grad, y.dtype.element_ty), mask=inside)
