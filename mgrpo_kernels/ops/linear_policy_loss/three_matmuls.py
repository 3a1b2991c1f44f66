"""Three matmuls where four are usual: the logits of a block of rows stay until the loss has said what their gradient is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

ROWS_WITHOUT_GRADIENT = 1024
"""Of a tile at most, unless more rows of a block have a gradient: a larger tile would not stay in a CPU's cache."""


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

    Only the first `live` rows have a gradient; for the others, only the statistics are passed to `coefficients_of`.

    A block keeps the logits of its rows with a gradient until `coefficients_of` has said, from the statistics, what the gradient is. They
    are computed in contiguous tiles of at most `columns_at_once`, whose gradients have the same columns; or, with None, in one matmul.
    Rows without a gradient are the last of a tile, where the next tile is written over them.
    """
    number, vocab = hidden.shape[0], head.weight.shape[0]
    weight = tiled.weight_gradient(hidden[:live], head) if need[1] else None
    bound = head.workspace_bytes or workspace_bytes
    room = _room(hidden, head, weight, passes, columns_at_once, bound, live)
    columns_at_once = room.gradient_columns if columns_at_once else vocab
    sums = tiled.Sums(hidden, head, need)
    if sums.hidden is not None:
        sums.hidden[live:].zero_()
    for block, live_here in _blocks(number, live, room):
        state = tiled.empty_state(block.stop - block.start, hidden.device, passes.wanted)
        for columns in tiled.spans(vocab, columns_at_once, tiled.ALIGNED):
            x = room.tile_of(block, live_here, columns, passes.padding)
            passes.fill(x, hidden[block], tiled.of_tile(head, block, columns), labels[block], state)
        statistics = _statistics.finish(state, labels[block])
        coefficients = coefficients_of(block, statistics)[:, :live_here]
        rows, logsumexp = slice(block.start, block.start + live_here), statistics.logsumexp[:live_here]
        for columns in tiled.spans(vocab, columns_at_once, tiled.ALIGNED) if live_here else ():
            tile = room.tile_of(rows, live_here, columns, passes.padding)
            for part in tiled.spans(columns.stop - columns.start, room.gradient_columns, tiled.ALIGNED):
                span = slice(columns.start + part.start, columns.start + part.stop)
                tile_head, x = tiled.of_tile(head, rows, span), tile[:, part]
                grad = x if room.gradients is None else tiled.place_of(room.gradients, rows, span, passes.padding)
                passes.gradient(x, tile_head, labels[rows], coefficients, logsumexp, grad)
                sums.add(grad, tile_head.weight, rows, span)
                if room.total is not None:
                    tiled.accumulate(room.total[span], grad.t(), hidden[rows], first=rows.start == 0)
    if weight is not None and room.total is not None and room.total is not weight:
        weight.copy_(room.total)
    return sums.hidden, weight, sums.bias


class _Room(NamedTuple):
    """Where :func:`forward_backward` keeps what."""

    rows: int  # of a block, that have a gradient
    total: Tensor | None  # the weight's gradient, or its sum in float32
    logits: Tensor  # of a block
    per_column: int | None  # elements of `logits`, where they use the memory of the weight's gradient
    gradients: Tensor | None  # of the logits of some columns; None: in place of the logits
    gradient_columns: int
    strides: tuple[int, int]  # of a row of all logits, and of a tile

    def tile_of(self, rows: slice, live: int, columns: slice, padding: int) -> Tensor:
        """Return the place of a tile of a block in which `live` rows have a gradient."""
        per_column = self.per_column if live and self.per_column else live
        return tiled.place_of(self.logits, rows, columns, padding, per_column=per_column)

    def rows_beside(self, live: int) -> int:
        """Return for how many rows without a gradient a block has room beside `live` rows with one."""
        of_all, of_tile = self.strides
        fit = self.per_column - live if live and self.per_column else (self.logits.numel() - live * of_all) // of_tile
        return min(max(self.rows, ROWS_WITHOUT_GRADIENT), fit)


def _blocks(number: int, live: int, room: _Room) -> Iterator[tuple[slice, int]]:
    """Yield the rows of each block, and how many of them have a gradient: the first of the block, as the `live` rows are the first of all.

    The last rows with a gradient share matmuls with those without: the fewer rows a matmul has, the more it costs to read the weight.
    Blocks without a gradient come first, while nothing else is where their logits are.
    """
    spans = [*tiled.spans(live, room.rows, tiled.ALIGNED)]
    end = min(number, live + room.rows_beside(spans[-1].stop - spans[-1].start)) if spans else 0
    for rows in tiled.spans(number - end, room.rows_beside(0), tiled.ALIGNED):
        yield slice(end + rows.start, end + rows.stop), 0
    for rows in spans:
        yield slice(rows.start, rows.stop if rows.stop < live else end), rows.stop - rows.start


def _room(
    hidden: Tensor,
    head: Head,
    weight: Tensor | None,
    passes: tiled.Passes,
    columns_at_once: int | None,
    bound: int,
    live: int,
) -> _Room:
    """Return how many rows a block has, and room for it: in the weight's gradient if its logits fit there.

    Else, with several blocks, a 16-bit gradient of the weight (`weight`, which will be returned) is summed in float32, and is read and
    written once for each block. So one block takes all rows where their logits need no more memory than that sum would. With
    several, `weight` is not needed before the end, and holds the logits where it has more room for them than `bound`.
    """
    dtype, raw_dtype = tiled.gradient_dtype(head), head.raw_dtype
    one_matmul = dtype == hidden.dtype and tiled.rounds_once(head.weight.shape, hidden.device, hidden.dtype)
    if columns_at_once and live and weight is not None and (weight.dtype == torch.float32 or one_matmul):
        room = _room_in_gradient(weight, hidden, head, passes, columns_at_once, bound, live)
        if room is not None:
            return room
    number, vocab = hidden.shape[0], head.weight.shape[0]
    stride, element_bytes = tiled.padded(vocab, passes.padding), raw_dtype.itemsize
    in_place = raw_dtype == dtype
    columns_at_once = min(vocab, columns_at_once or vocab)
    gradient_columns = columns_at_once if in_place else min(columns_at_once, GRADIENT_COLUMNS)
    row_bytes = stride * element_bytes
    if not in_place:
        row_bytes += tiled.padded(gradient_columns, passes.padding) * hidden.element_size()
    rows, total, logits = max(1, bound // row_bytes), weight, None
    most = (bound - min(rows, live) * (row_bytes - stride * element_bytes)) // element_bytes  # of logits
    bounded = True
    if live and weight is not None and weight.dtype != torch.float32 and (live > rows or not one_matmul):
        bounded = False
        in_sum = (4 * weight.numel() + (bound if in_place else 0)) // element_bytes
        if one_matmul and live * stride <= in_sum:
            rows, most = live, in_sum
        else:
            total = torch.empty(weight.shape, device=weight.device, dtype=torch.float32)
            memory = _memory_of(weight, raw_dtype)
            if memory.numel() // stride > rows:
                rows, logits = memory.numel() // stride, memory
    in_block, strides = min(rows, live), (stride, tiled.padded(columns_at_once, passes.padding))
    if logits is None:
        beside = min(number - live, max(rows, ROWS_WITHOUT_GRADIENT))
        elements = min(in_block * strides[0] + beside * strides[1], most)
        logits = hidden.new_empty(max(elements, in_block * strides[0], strides[1]), dtype=raw_dtype)
    if in_place:
        return _Room(rows, total, logits, None, None, gradient_columns, strides)
    if not bounded:  # more rows than the bound holds: the columns of gradients alone keep to it
        gradient_columns = _columns_within(bound, in_block, dtype, gradient_columns)
    gradients = tiled.make_workspace(hidden, in_block, gradient_columns, passes.padding, dtype)
    return _Room(rows, total, logits, None, gradients, gradient_columns, strides)


def _room_in_gradient(
    weight: Tensor,
    hidden: Tensor,
    head: Head,
    passes: tiled.Passes,
    columns_at_once: int,
    bound: int,
    live: int,
) -> _Room | None:
    """Return room for one block in `weight`, the gradient to be returned, or None if the logits do not fit.

    The logits of some columns use the memory of these columns' gradient, so they need none of their own. That gradient is computed from
    the tile's gradient, which therefore needs a workspace, even where it has the dtype of the logits. Logits fit if a column of them, one
    for each row, takes no more bytes than a row of the weight.
    """
    raw_dtype, dtype = head.raw_dtype, tiled.gradient_dtype(head)
    per_column, rest = divmod(weight.shape[1] * weight.element_size(), raw_dtype.itemsize)
    if live > per_column or rest:
        return None
    columns = _columns_within(bound, live, dtype, min(columns_at_once, weight.shape[0]))
    gradients = tiled.make_workspace(hidden, live, columns, passes.padding, dtype)
    strides = tiled.padded(weight.shape[0], passes.padding), tiled.padded(columns, passes.padding)
    return _Room(live, weight, _memory_of(weight, raw_dtype), per_column, gradients, columns, strides)


def _columns_within(bound: int, rows: int, dtype: torch.dtype, most: int) -> int:
    """Return how many columns of gradients of these rows, at most, keep to the bound."""
    columns = bound // (max(1, rows) * dtype.itemsize)
    columns -= columns % tiled.ALIGNED if columns > tiled.ALIGNED else 0
    return max(1, min(most, columns))


def _memory_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the memory of a contiguous tensor as elements of `dtype`, as many as it holds."""
    memory = weight.view(-1).view(torch.uint8)
    return memory[: len(memory) // dtype.itemsize * dtype.itemsize].view(dtype)
