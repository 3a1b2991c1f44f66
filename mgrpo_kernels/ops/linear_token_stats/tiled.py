"""The fused head over tiles of logits: the loop that the native and the Triton backend share.

The library's matmul fills one tile ``(rows, columns)`` of raw logits in a reused workspace, and a backend's pass goes over it
while it is in cache: :meth:`Passes.state` folds it into the rows' statistics, :meth:`Passes.gradient_` turns it into its own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mgrpo_kernels.ops import _statistics
from mgrpo_kernels.ops.linear_token_stats.specs import Head

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
CoefficientsOf = Callable[[slice, _statistics.Statistics], Tensor]  # (rows, their statistics) -> (4, n)


ALIGNED = 64  # a tile's columns are a multiple of this, but for the last: rows then begin where wide loads and matmuls want them


class Passes(Protocol):
    """What a backend does with a tile. Both write in place, and nothing else."""

    def state(self, x: Tensor, head: Head, labels: Tensor | None, state: Tensor) -> None:
        """Fold raw logits x ``(n, C)`` into the running ``state`` ``(6, n)`` float32 (any strides). `head` is sliced to the tile."""
        ...

    def gradient_(self, x: Tensor, head: Head, labels: Tensor | None, coefficients: Tensor, logsumexp: Tensor) -> None:
        """Overwrite raw logits x ``(n, C)`` with their gradient, of coefficients ``(4, n)`` and logsumexp ``(n,)`` float32."""
        ...


class TileShape(NamedTuple):
    """How many rows and columns of logits a tile has at most, where `workspace_bytes` does not ask for less."""

    rows: int
    columns: int

    def within(self, workspace_bytes: int | None, element_size: int) -> TileShape:
        """Return a shape that keeps to `workspace_bytes`: first fewer columns, down to 256, then fewer rows."""
        if workspace_bytes is None:
            return self
        elements = max(1, workspace_bytes // element_size)
        columns = max(1, min(self.columns, max(256, elements // self.rows), elements))
        columns = columns - columns % ALIGNED if columns > ALIGNED else columns
        return TileShape(max(1, min(self.rows, elements // columns)), columns)


def spans(total: int, size: int, multiple: int = 1) -> Iterator[slice]:
    """Cut [0, total) into slices of at most `size`, as even as multiples of `multiple` go."""
    pieces = -(-total // size)
    even = -(-total // max(1, pieces))
    step = max(1, min(size, -(-even // multiple) * multiple))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def of_tile(head: Head, rows: slice, columns: slice) -> Head:
    """Return the head that a tile sees."""
    return head._replace(
        weight=head.weight[columns],
        bias=None if head.bias is None else head.bias[columns],
        temperature=head.temperature[rows] if isinstance(head.temperature, Tensor) else head.temperature,
        vocab_start=head.vocab_start + columns.start,
    )


def empty_state(number: int, device: torch.device) -> Tensor:
    """Return the state ``(6, N)`` of rows of which nothing has been seen."""
    state = torch.zeros(_statistics.STATE_ROWS, number, device=device)
    state[_statistics.MAX] = -torch.inf
    return state


def accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Add a @ b to the float32 `total` (or write it there), in float32 where the library's matmul can."""
    if a.dtype == total.dtype:
        torch.mm(a, b, out=total) if first else torch.addmm(total, a, b, out=total)
    elif a.is_cuda and torch.version.hip is None:
        if first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # only the input dtype comes out
        product = torch.mm(a, b)
        total.copy_(product) if first else total.add_(product)


def forward(hidden: Tensor, head: Head, labels: Tensor | None, passes: Passes, shape: TileShape) -> Tensor:
    """Return the state ``(6, N)`` of the rows of `hidden` ``(N, H)``. Weights are the outer loop: each is read once."""
    number, vocab = hidden.shape[0], head.weight.shape[0]
    shape = shape.within(head.workspace_bytes, hidden.element_size())
    state = empty_state(number, hidden.device)
    workspace = hidden.new_empty(min(shape.rows, number) * min(shape.columns, vocab))
    for columns in spans(vocab, shape.columns, ALIGNED):
        for rows in spans(number, shape.rows):
            tile_head = of_tile(head, rows, columns)
            x = _view(workspace, rows, columns)
            torch.mm(hidden[rows], tile_head.weight.t(), out=x)
            passes.state(x, tile_head, None if labels is None else labels[rows], state[:, rows])
    return state


def backward(
    hidden: Tensor,
    head: Head,
    labels: Tensor | None,
    coefficients: Tensor,
    logsumexp: Tensor,
    need: tuple[bool, bool, bool],
    passes: Passes,
    shape: TileShape,
) -> Gradients:
    """Return the gradients of hidden (float32), weight and bias (their dtype): each tile computed again, then two matmuls."""
    number, vocab = hidden.shape[0], head.weight.shape[0]
    shape = shape.within(head.workspace_bytes, hidden.element_size())
    sums = _Sums(hidden, head, need, vocab_wide=False)
    workspace = hidden.new_empty(min(shape.rows, number) * min(shape.columns, vocab))
    for columns in spans(vocab, shape.columns, ALIGNED):
        for rows in spans(number, shape.rows):
            tile_head = of_tile(head, rows, columns)
            x = _view(workspace, rows, columns)
            torch.mm(hidden[rows], tile_head.weight.t(), out=x)
            passes.gradient_(
                x, tile_head, None if labels is None else labels[rows], coefficients[:, rows], logsumexp[rows]
            )
            sums.add(x, hidden[rows], tile_head.weight, rows, columns)
        sums.close(columns)
    return sums.result()


def forward_backward(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    coefficients_of: CoefficientsOf,
    need: tuple[bool, bool, bool],
    passes: Passes,
    columns_at_once: int,
    workspace_bytes: int,
) -> Gradients:
    """Return the gradients of hidden (float32), weight and bias (float32), with the matmul of the logits done only once.

    A block of rows keeps all its logits in the workspace until `coefficients_of` has said, from its statistics, what the
    gradient is.
    """
    number, vocab = hidden.shape[0], head.weight.shape[0]
    rows_at_once = max(1, (head.workspace_bytes or workspace_bytes) // (vocab * hidden.element_size()))
    sums = _Sums(hidden, head, need, vocab_wide=True)
    workspace = hidden.new_empty(min(rows_at_once, number) * vocab)
    for rows in spans(number, rows_at_once):
        state = empty_state(rows.stop - rows.start, hidden.device)
        for columns in spans(vocab, columns_at_once, ALIGNED):
            tile_head = of_tile(head, rows, columns)
            x = _view(workspace, rows, columns, keep=True)
            torch.mm(hidden[rows], tile_head.weight.t(), out=x)
            passes.state(x, tile_head, labels[rows], state)
        statistics = _statistics.finish(state, labels[rows])
        coefficients = coefficients_of(rows, statistics)
        for columns in spans(vocab, columns_at_once, ALIGNED):
            tile_head = of_tile(head, rows, columns)
            x = _view(workspace, rows, columns, keep=True)
            passes.gradient_(x, tile_head, labels[rows], coefficients, statistics.logsumexp)
            sums.add(x, hidden[rows], tile_head.weight, rows, columns)
    return sums.result()


def _view(workspace: Tensor, rows: slice, columns: slice, *, keep: bool = False) -> Tensor:
    """Return the tile's place: always the same, or with `keep` one for each span of columns. Contiguous, so that matmuls are fast."""
    n, first = rows.stop - rows.start, columns.start if keep else 0
    width = columns.stop - columns.start
    return workspace[n * first : n * (first + width)].view(n, width)


class _Sums:
    """The float32 accumulators of the three gradients.

    With weights as the outer loop a tile's part of the weight's gradient is complete before the next begins, and 16-bit weights
    need only a tile of accumulator; else (`vocab_wide`) the whole gradient accumulates.
    """

    def __init__(self, hidden: Tensor, head: Head, need: tuple[bool, bool, bool], *, vocab_wide: bool) -> None:
        wants_hidden, wants_weight, wants_bias = need
        vocab = head.weight.shape[0]
        empty = hidden.shape[0] == 0
        make = torch.zeros if empty else torch.empty  # without rows no sum is ever begun
        self.hidden = torch.zeros(hidden.shape, device=hidden.device) if wants_hidden else None
        weight_dtype = torch.float32 if vocab_wide else head.weight.dtype
        self.weight = make(head.weight.shape, dtype=weight_dtype, device=hidden.device) if wants_weight else None
        self.bias = torch.zeros(vocab, device=hidden.device) if wants_bias and head.bias is not None else None
        self.bias_dtype = torch.float32 if vocab_wide else hidden.dtype
        self.tile: Tensor | None = None  # float32 accumulator of one span of columns

    def add(self, grad: Tensor, hidden: Tensor, weight: Tensor, rows: slice, columns: slice) -> None:
        if self.hidden is not None:
            accumulate(self.hidden[rows], grad, weight, first=columns.start == 0)
        if self.weight is not None:
            total = self.weight[columns]
            if total.dtype != torch.float32:
                if self.tile is None or self.tile.shape != total.shape:
                    self.tile = torch.empty(total.shape, device=total.device)
                total = self.tile
            accumulate(total, grad.t(), hidden, first=rows.start == 0)
        if self.bias is not None:
            self.bias[columns] += grad.sum(0, dtype=torch.float32)

    def close(self, columns: slice) -> None:
        if self.tile is not None and self.weight is not None:
            self.weight[columns].copy_(self.tile)

    def result(self) -> Gradients:
        return self.hidden, self.weight, None if self.bias is None else self.bias.to(self.bias_dtype)
