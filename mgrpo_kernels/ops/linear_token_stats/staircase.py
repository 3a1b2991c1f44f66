"""A backward pass over few entries in dense matmuls.

The entries that a row's gradient needs are scattered over the vocabulary, and to gather a row of the weight for each of them costs a GPU
more than to multiply the row by dozens of columns that it does not need. So rows are sorted by how many entries they need, the neediest
first. A column that is needed by the n-th row is multiplied with the first n: sorted by their n, the columns form the steps of a stair, and
each step is one dense product. No row misses a column that it needs, and each further one makes its gradient more exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels.ops.linear_token_stats import tiled
from mgrpo_kernels.ops.linear_token_stats.listing import MAX_ROOM
from mgrpo_kernels.ops.linear_token_stats.specs import Head

VOCAB_PER_ENTRY = 12  # of the vocabulary for each entry that there is room for
STEPS_IN_HALF = 4  # steps from N rows to N / 2: a column is multiplied with at most a fifth more rows than it needs
COLUMNS_OF_A_STEP = (
    256  # whose matmuls take as long as to read and write the gradient of the hidden states, once a step
)
DENSE_FROM = 0.75  # of all rows times all columns: with more to multiply, gathering columns costs more than it saves
COPIES_SHARE = (
    4  # the copies of a tile's rows of the weight, and their gradient, take at most this part of the workspace
)


def entries_room(vocab: int) -> int:
    """Return for how many logits of a row there is room between the forward and the backward pass."""
    return min(MAX_ROOM, vocab // VOCAB_PER_ENTRY + 1)


class Step(NamedTuple):
    """The first rows, in the order of their need, times some columns, in that of theirs."""

    rows: int
    columns: slice


class Stair(NamedTuple):
    """Which rows are multiplied with which columns."""

    rows: Tensor  # (N,): their order
    columns: Tensor  # (V,): likewise
    steps: list[Step]

    @property
    def products(self) -> int:
        """The number of logits whose gradient is formed."""
        return sum(step.rows * (step.columns.stop - step.columns.start) for step in self.steps)


def stair_of(needed: Tensor, least: Tensor) -> Stair:
    """Return the stair for rows that need so many entries ``(N,)``, and columns ``(V,)`` that are needed by rows of no less a need.

    A row that `needed` gives 0 is in no step, and a row that needs at least `least` is multiplied with that column. The host reads the
    steps, some dozens of numbers: it waits for the device here.
    """
    number, vocab = len(needed), len(least)
    need, rows = needed.sort(descending=True, stable=True)
    # -need ascends: so many rows need at least as much as the least needy row of the column.
    of_column = torch.searchsorted(-need, -least, right=True)
    of_column, columns = of_column.sort(descending=True, stable=True)
    lows = [int(number * 2.0 ** (-i / STEPS_IN_HALF)) for i in range(1, STEPS_IN_HALF * (number.bit_length() + 1))]
    above = torch.tensor([*dict.fromkeys(lows)], device=least.device)  # descending, to 0
    stops = torch.searchsorted(-of_column, -above)  # so many columns are needed by more rows than that
    starts = torch.cat([stops.new_zeros(1), stops[:-1]])
    found = torch.stack([stops, of_column[starts.clamp(max=vocab - 1)]]).tolist()  # the one read of the device
    steps: list[Step] = []
    for last, of_step in zip(*found, strict=True):
        start = steps[-1].columns.stop if steps else 0
        stop = min(vocab, -(-last // tiled.ALIGNED) * tiled.ALIGNED)
        if stop <= start:
            continue
        if steps and (steps[-1].rows - of_step) * (stop - start) <= COLUMNS_OF_A_STEP * of_step:
            steps[-1] = steps[-1]._replace(columns=slice(steps[-1].columns.start, stop))
        else:
            steps.append(Step(of_step, slice(start, stop)))
    return Stair(rows, columns, steps)


def backward(
    hidden: Tensor,  # (N, H)
    head: Head,
    labels: Tensor | None,  # (N,)
    coefficients: Tensor,  # (4, N)
    logsumexp: Tensor,  # (N,)
    need: tuple[bool, bool, bool],
    passes: tiled.Passes,
    stair: Stair,
    workspace_bytes: int,
) -> tiled.Gradients:
    """Return the gradients of hidden (float32), weight and bias (their dtype): each step's logits computed again, then two matmuls."""
    rows = stair.rows[: stair.steps[0].rows if stair.steps else 0]
    taken, coefficients, logsumexp = hidden[rows], coefficients[:, rows], logsumexp[rows]
    places = None if labels is None else _places(labels[rows] - head.vocab_start, stair.columns)
    ordered = head._replace(
        bias=None if head.bias is None else head.bias[stair.columns],
        temperature=head.temperature[rows] if isinstance(head.temperature, Tensor) else head.temperature,
        vocab_start=0,
    )
    sums = tiled.Sums(taken, ordered, need)
    weight = torch.zeros_like(head.weight) if need[1] else None
    for step in stair.steps:
        shape = _tile_shape(step, head, passes, workspace_bytes)
        gradients = tiled.make_workspace(hidden, *shape, passes.padding, tiled.gradient_dtype(head))
        logits = gradients
        if tiled.needs_two_tiles(head, passes):
            logits = tiled.make_workspace(hidden, *shape, passes.padding, head.raw_dtype)
        for part in tiled.spans(step.columns.stop - step.columns.start, shape.columns, tiled.ALIGNED):
            columns = slice(step.columns.start + part.start, step.columns.start + part.stop)
            ids = stair.columns[columns]
            of_columns = head.weight[ids]
            total = None if weight is None else _part_of_weight(of_columns, step, shape, head)
            for span in tiled.spans(step.rows, shape.rows):
                tile_head = tiled.of_tile(ordered, span, columns, of_columns)
                x, grad = (tiled.place_of(each, span, columns, passes.padding) for each in (logits, gradients))
                of_labels = None if places is None else places[span]
                given = tile_head, of_labels, coefficients[:, span], logsumexp[span], grad
                passes.fill_gradient(x, taken[span], *given)
                sums.add(grad, of_columns, span, columns)
                if total is not None:
                    tiled.accumulate(total, grad.t(), taken[span], first=span.start == 0)
            if weight is not None and total is not None:
                weight.index_copy_(0, ids, total.to(weight.dtype))
    grad_hidden = None
    if sums.hidden is not None:
        grad_hidden = sums.hidden.new_zeros(hidden.shape).index_copy_(0, rows, sums.hidden)
    grad_bias = sums.bias_in(hidden.dtype)
    if grad_bias is not None:
        grad_bias = torch.empty_like(grad_bias).index_copy_(0, stair.columns, grad_bias)
    return grad_hidden, weight, grad_bias


def _places(labels: Tensor, columns: Tensor) -> Tensor:
    """Return the places of labels ``(n,)`` in the order of the columns, -1 for those that are no column of this head."""
    places = torch.empty_like(columns)
    places[columns] = torch.arange(len(columns), device=columns.device)
    inside = (labels >= 0) & (labels < len(columns))
    return torch.where(inside, places[labels.clamp(0, len(columns) - 1)], -1)


def _tile_shape(step: Step, head: Head, passes: tiled.Passes, workspace_bytes: int) -> tiled.TileShape:
    """Return the tile of a step: its logits and gradients keep to the workspace, and what is copied for its columns to a share of that."""
    width = step.columns.stop - step.columns.start
    shape = tiled.TileShape(step.rows, width).within(workspace_bytes, tiled.backward_bytes(head, passes))
    copied = workspace_bytes // COPIES_SHARE // (head.weight.shape[1] * (head.weight.element_size() + 4))
    return shape._replace(columns=min(shape.columns, max(COLUMNS_OF_A_STEP, copied - copied % tiled.ALIGNED)))


def _part_of_weight(of_columns: Tensor, step: Step, shape: tiled.TileShape, head: Head) -> Tensor:
    """Return room for the weight's gradient of a tile's columns: in their dtype where one matmul gives it, else in float32."""
    if tiled.is_one_matmul(of_columns, step.rows, head, shape):
        return torch.empty_like(of_columns)
    return torch.empty_like(of_columns, dtype=torch.float32)
