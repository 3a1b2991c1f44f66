"""Three matmuls where four are usual: the logits of a block of rows stay until the loss has said what their gradient is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels.ops import _statistics
from mgrpo_kernels.ops.linear_token_stats import tiled
from mgrpo_kernels.ops.linear_token_stats.specs import Head

CoefficientsOf = Callable[[slice, _statistics.Statistics], Tensor]  # (rows, their statistics) -> (4, n)

WANTED = _statistics.Wanted(logprob=True, entropy=True, self_certainty=False)
"""The statistics that a loss and its metrics are computed from."""

FEWER = "3 matmuls take less time than 4"
FLOAT16 = "float16 gradients are formed after the loss has been scaled up, or they vanish"
"""Why a backend fuses, and why not in this dtype."""

GRADIENT_COLUMNS = 16384
"""Of a block of rows whose logits are kept in float32: so many have their 16-bit gradient at one time."""


def forward_backward(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    coefficients_of: CoefficientsOf,
    need: tuple[bool, bool, bool],
    passes: tiled.Passes,
    columns_at_once: int | None,
    workspace_bytes: int,
    live: int,
) -> tiled.Gradients:
    """Return the gradients of hidden, bias (float32) and weight (its dtype), with the matmul of the logits done only once.

    Only the first `live` rows have a gradient; of the others, `coefficients_of` is told the statistics.

    A block of rows keeps all its logits until `coefficients_of` has said, from its statistics, what the gradient is. They are computed in
    contiguous tiles of at most `columns_at_once`, whose gradients have the same columns; or, with None, in one matmul.
    """
    number, vocab = hidden.shape[0], head.weight.shape[0]
    weight = tiled.weight_gradient(hidden[:live], head) if need[1] else None
    bound = head.workspace_bytes or workspace_bytes
    room = _room(hidden, head, weight, passes, columns_at_once or vocab, bound, live)
    columns_at_once = room.gradient_columns if columns_at_once else vocab
    sums = tiled.Sums(hidden, head, need)
    if sums.hidden is not None:
        sums.hidden[live:].zero_()
    without_gradient = (
        slice(live + each.start, live + each.stop) for each in tiled.spans(number - live, room.rows, tiled.ALIGNED)
    )
    for rows in (*tiled.spans(live, room.rows, tiled.ALIGNED), *without_gradient):
        state = tiled.empty_state(rows.stop - rows.start, hidden.device, passes.wanted)
        for columns in tiled.spans(vocab, columns_at_once, tiled.ALIGNED):
            tile_head = tiled.of_tile(head, rows, columns)
            x = tiled.place_of(room.logits, rows, columns, passes.padding, keep=True)
            passes.fill(x, hidden[rows], tile_head, labels[rows], state)
        statistics = _statistics.finish(state, labels[rows])
        coefficients = coefficients_of(rows, statistics)
        if rows.start >= live:
            continue
        for columns in tiled.spans(vocab, columns_at_once, tiled.ALIGNED):
            tile = tiled.place_of(room.logits, rows, columns, passes.padding, keep=True)
            for part in tiled.spans(columns.stop - columns.start, room.gradient_columns, tiled.ALIGNED):
                span = slice(columns.start + part.start, columns.start + part.stop)
                tile_head, x = tiled.of_tile(head, rows, span), tile[:, part]
                grad = x if room.gradients is None else tiled.place_of(room.gradients, rows, span, passes.padding)
                passes.gradient(x, tile_head, labels[rows], coefficients, statistics.logsumexp, grad)
                sums.add(grad, tile_head.weight, rows, span)
                if room.total is not None:
                    tiled.accumulate(room.total[span], grad.t(), hidden[rows], first=rows.start == 0)
    if weight is not None and room.total is not None and room.total is not weight:
        weight.copy_(room.total)
    return sums.hidden, weight, sums.bias


class _Room(NamedTuple):
    """Where :func:`forward_backward` keeps what."""

    rows: int  # of a block
    total: Tensor | None  # the weight's gradient, or its sum in float32
    logits: Tensor  # of a block
    gradients: Tensor | None  # of the logits of some columns; None: in place of the logits
    gradient_columns: int


def _room(
    hidden: Tensor,
    head: Head,
    weight: Tensor | None,
    passes: tiled.Passes,
    columns_at_once: int,
    bound: int,
    live: int,
) -> _Room:
    """Return how many rows a block has, and room for it.

    With several blocks, a 16-bit gradient of the weight (`weight`, which will be returned) is summed in float32, and is read and
    written once for each block. So one block takes all rows where their logits need no more memory than that sum would. With
    several, `weight` is not needed before the end, and holds the logits where it has more room for them than `bound`.
    """
    number, vocab = hidden.shape[0], head.weight.shape[0]
    stride, element_bytes = tiled.padded(vocab, passes.padding), head.raw_dtype.itemsize
    in_place = head.raw_dtype == tiled.gradient_dtype(head)
    gradient_columns = min(vocab, columns_at_once if in_place else min(columns_at_once, GRADIENT_COLUMNS))
    row_bytes = stride * element_bytes
    if not in_place:
        row_bytes += tiled.padded(gradient_columns, passes.padding) * hidden.element_size()
    rows, total, logits = max(1, bound // row_bytes), weight, None
    one_matmul = tiled.gradient_dtype(head) == hidden.dtype and tiled.rounds_once(
        head.weight.shape, hidden.device, hidden.dtype
    )
    bounded = True
    if live and weight is not None and weight.dtype != torch.float32 and (live > rows or not one_matmul):
        bounded = False
        sum_bytes = 4 * weight.numel()
        if one_matmul and live * stride * element_bytes <= sum_bytes + (bound if in_place else 0):
            rows = live
        else:
            total = torch.empty(weight.shape, device=weight.device, dtype=torch.float32)
            in_weight = weight.numel() * weight.element_size() // element_bytes
            if in_weight // stride > rows:
                rows = in_weight // stride
                logits = weight.view(-1).view(torch.uint8)[: in_weight * element_bytes].view(head.raw_dtype)
    if logits is None:
        logits = tiled.make_workspace(hidden, min(rows, number), vocab, passes.padding, head.raw_dtype)
    if in_place:
        return _Room(rows, total, logits, None, gradient_columns)
    if not bounded:  # more rows than the bound holds: the columns of gradients alone keep to it
        columns = bound // (max(1, min(rows, number)) * hidden.element_size())
        columns -= columns % tiled.ALIGNED if columns > tiled.ALIGNED else 0
        gradient_columns = max(1, min(gradient_columns, columns))
    gradients = tiled.make_workspace(hidden, min(rows, number), gradient_columns, passes.padding, hidden.dtype)
    return _Room(rows, total, logits, gradients, gradient_columns)
