"""The fused head over tiles of logits: the loop that the native and the Triton backend share.

The library's matmul fills one tile ``(rows, columns)`` of raw logits in a reused workspace, and a backend's pass goes over it, on a CPU
while it is in the cache (a GPU's tile of hundreds of MiB is read from memory): :meth:`Passes.state` folds it into the rows'
statistics, :meth:`Passes.gradient` computes its gradient. Tiles for which there is room are stored between the two (:class:`Stored`),
and are not multiplied for again.

A product of two 16-bit numbers is exact in float32, so 16-bit operands with a float32 tile give the logits of a float32 head at the
speed of a 16-bit matmul. Their gradient is rounded to 16 bits, since it is an operand of the two matmuls that follow.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from operator import ge
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mgrpo_kernels import _native
from mgrpo_kernels.backend import traced_as_constant
from mgrpo_kernels.ops import _statistics
from mgrpo_kernels.ops._rows import take
from mgrpo_kernels.ops._statistics import EVERYTHING, Wanted
from mgrpo_kernels.ops.linear_token_stats.specs import Head

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

ALIGNED = 64  # a tile's columns are a multiple of this, but for the last: rows then begin where wide loads and matmuls want them
# Elements of a product from which a GPU's matmul has no reason to split the inner dimension among its multiprocessors and to
# add up the pieces in 16 bits, as it may where PyTorch's allow_bf16_reduced_precision_reduction, or that of fp16, is set (the default).
UNSPLIT_FROM = 2**25
# Of the float32 copy of a factor of several matmuls, where no matmul of 16-bit factors has a float32 result.
OPERAND_BYTES = 32 * 2**20
WHOLE_BLOCKS_FROM = 32, 64, 128  # rows, inner dimension and columns
STORED_FROM = 6  # a sixth of all logits: to store fewer saves less than the memory is worth, and on a GPU than narrower tiles cost
WIDENED_BYTES = 4 * 2**20  # of such copies for one matmul, where its factors are larger


class Passes:
    """What a backend does with a tile. A backend writes :meth:`state` and :meth:`gradient`; the matmuls are the library's.

    The passes compute nothing for statistics that are not `wanted`, or that have no gradient (`gradients`, by default of all wanted).
    """

    padding = 1  # a tile's row stride is a multiple of this many elements
    in_registers = False  # True if :meth:`fill_gradient` needs no tile of raw logits

    def __init__(self, wanted: Wanted = EVERYTHING, gradients: Wanted | None = None) -> None:
        self.wanted, self.gradients = wanted, wanted if gradients is None else gradients

    def of_rows(self, rows: slice) -> Passes:
        """Return the passes for these rows. A backend that keeps something of each row, beside the state, overrides it."""
        return self

    def state(self, x: Tensor, head: Head, labels: Tensor | None, state: Tensor) -> None:
        """Fold raw logits x ``(n, C)`` into the running ``state`` ``(6, n)`` float32 (any strides). `head` is sliced to the tile."""
        raise NotImplementedError

    def gradient(
        self, x: Tensor, head: Head, labels: Tensor | None, coefficients: Tensor, logsumexp: Tensor, out: Tensor
    ) -> None:
        """Write the gradient of raw logits x ``(n, C)`` to `out`, which may be x itself.

        `coefficients` ``(4, n)`` and `logsumexp` ``(n,)`` are float32.
        """
        raise NotImplementedError

    def fill(self, x: Tensor, hidden: Tensor, head: Head, labels: Tensor | None, state: Tensor) -> None:
        """Write the raw logits of `hidden` ``(n, H)`` to x ``(n, C)`` and fold them into the running state."""
        accumulate(x, hidden, head.weight.t(), first=True)
        self.state(x, head, labels, state)

    def fill_gradient(
        self,
        x: Tensor,
        hidden: Tensor,
        head: Head,
        labels: Tensor | None,
        coefficients: Tensor,
        logsumexp: Tensor,
        out: Tensor,
    ) -> None:
        """Write the gradient of the raw logits of `hidden` ``(n, H)`` to `out` ``(n, C)``; x holds the logits, and may be `out`."""
        accumulate(x, hidden, head.weight.t(), first=True)
        self.gradient(x, head, labels, coefficients, logsumexp, out)


class TileShape(NamedTuple):
    """How many rows and columns of logits a tile has at most."""

    rows: int
    columns: int

    def within(self, workspace_bytes: int | None, element_bytes: int) -> TileShape:
        """Return a shape that keeps to `workspace_bytes`: first fewer columns, down to 256, then fewer rows. None: this one."""
        if workspace_bytes is None:
            return self
        elements = max(1, workspace_bytes // element_bytes)
        columns = max(1, min(self.columns, max(256, elements // self.rows), elements))
        columns = columns - columns % ALIGNED if columns > ALIGNED else columns
        return TileShape(max(1, min(self.rows, elements // columns)), columns)


class Stored(NamedTuple):
    """Raw logits that the forward pass stores for the backward pass: those of the first columns, as many as there is room for."""

    values: Tensor  # (room,) in the head's `raw_dtype`, tile after tile
    number: int  # rows of the forward pass
    rows: Tensor | None = None  # which of them the backward pass has; None: all

    def tile(self, columns: slice, padding: int) -> Tensor | None:
        """Return the tile ``(number, C)`` of these columns, or None if there is no room for it."""
        end = columns.start + padded(columns.stop - columns.start, padding)
        if self.number * end > self.values.numel():
            return None
        return place_of(self.values, slice(0, self.number), columns, padding, per_column=self.number)

    def take(self, tile: Tensor, rows: slice, x: Tensor) -> Tensor:
        """Return these rows of the backward pass: a part of the tile, or copied to x."""
        return tile[rows] if self.rows is None else torch.index_select(tile, 0, self.rows[rows], out=x)


def stored_room(number: int, vocab: int, room: int) -> int:
    """Return how many of the raw logits of `number` rows are stored where there is room for `room`. Both may be symbolic."""
    logits = number * vocab
    pays = torch.sym_min(1, STORED_FROM * room // torch.sym_max(1, logits))  # 1 or 0
    return torch.sym_min(logits, room * pays)  # type: ignore[no-any-return]


def gradient_dtype(head: Head) -> torch.dtype:
    """Return the dtype of a tile's gradient: the operands', or float32 where a matmul would convert 16-bit operands anyway."""
    weight = head.weight
    if head.raw_dtype == weight.dtype or multiplies_16_bits(weight.device, weight.dtype):
        return weight.dtype
    return head.raw_dtype


def needs_two_tiles(head: Head, passes: Passes) -> bool:
    """Return whether the gradient of a tile cannot take the place of its raw logits, because they have another dtype."""
    return head.raw_dtype != gradient_dtype(head) and not passes.in_registers


def backward_bytes(head: Head, passes: Passes) -> int:
    """Return how many bytes of workspace an element of the backward pass's tile takes at most."""
    size = gradient_dtype(head).itemsize
    return size + head.raw_dtype.itemsize if needs_two_tiles(head, passes) else size


def spans(total: int, size: int, multiple: int = 1) -> Iterator[slice]:
    """Cut [0, total) into slices of at most `size`, as even as multiples of `multiple` go."""
    pieces = -(-total // size)
    even = -(-total // max(1, pieces))
    step = max(1, min(size, -(-even // multiple) * multiple))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def operand(x: Tensor) -> Tensor:
    """Return a factor as the matmuls take it: in float32 where each would convert it, if that takes no more than OPERAND_BYTES."""
    if x.element_size() != 2 or 4 * x.numel() > OPERAND_BYTES or multiplies_16_bits(x.device, x.dtype):
        return x
    return x.float()


def of_tile(head: Head, rows: slice, columns: slice, weight: Tensor | None = None) -> Head:
    """Return the head that a tile sees; `weight` is that of the columns as an :func:`operand`."""
    return head._replace(
        weight=head.weight[columns] if weight is None else weight,
        bias=None if head.bias is None else head.bias[columns],
        temperature=take(head.temperature, rows),
        vocab_start=head.vocab_start + columns.start,
    )


def empty_state(number: int, device: torch.device, wanted: Wanted = EVERYTHING) -> Tensor:
    """Return the state ``(6, N)`` of rows of which nothing has been seen. Sums that are not wanted are NaN and stay so."""
    state = torch.zeros(_statistics.STATE_ROWS, number, device=device, dtype=torch.float32)
    state[_statistics.MAX] = -torch.inf
    return _statistics.without_unwanted(state, wanted)


def accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Add a @ b to `total`, or write it there if it is the first.

    A float32 total of 16-bit factors is summed in float32: no product is rounded to 16 bits before it is added. One step's gradient
    would look as exact with rounded products, but over dozens of steps their errors add up and the entropy drifts.
    """
    if a.dtype == b.dtype == total.dtype:
        if not (is_large(a, b) and native_accumulate(total, a, b, first)):
            torch.mm(a, b, out=total) if first else torch.addmm(total, a, b, out=total)
    elif a.dtype == b.dtype and multiplies_into_float32(a.device, a.dtype):
        if first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif total.dtype != torch.float32:  # of 16 bits, and a factor has been converted
        for rows in spans(total.shape[0], max(1, WIDENED_BYTES // (4 * max(1, total.shape[1])))):
            accumulate(wide := total[rows].float(), a[rows], b, first)
            total[rows] = wide
    elif not (a.device.type == "cpu" and a.dtype == b.dtype and native_accumulate(total, a, b, first)):
        accumulate_widened(total, a, b, first)


def is_large(a: Tensor, b: Tensor) -> bool:
    """Return whether csrc/cpu/matmul.cpp, which fills up its blocks with zeros, is worth while for these float32 factors."""
    fits = a.device.type == "cpu" and a.dtype == torch.float32
    return fits and all(map(ge, (*a.shape, b.shape[1]), WHOLE_BLOCKS_FROM))


@functools.cache
def multiplies_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether PyTorch has a matmul of this 16-bit dtype with a float32 result on the device, found out by a tiny product."""
    factor = torch.ones(16, 16, device=device, dtype=dtype)
    total = factor.float()
    try:
        torch.mm(factor, factor, out_dtype=total.dtype, out=total)
        torch.addmm(total, factor, factor, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):  # NotImplementedError, where the operator is missing, is a RuntimeError
        return False
    return True


@traced_as_constant
def multiplies_16_bits(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether :func:`accumulate` multiplies operands of this 16-bit dtype as they are, without converting them first."""
    return _multiplies_16_bits(device, dtype)


@functools.cache
def _multiplies_16_bits(device: torch.device, dtype: torch.dtype) -> bool:
    with _disable_current_modes():  # which see the caller's operators, not this product, and may not multiply at all
        if multiplies_into_float32(device, dtype):
            return True
        factor = torch.ones(16, 16, device=device, dtype=dtype)
        return device.type == "cpu" and native_accumulate(factor.float(), factor, factor, first=True)


def native_accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> bool:
    """Compute :func:`accumulate` with csrc/cpu/matmul.cpp; return False if the extension or the CPU lacks it."""
    return _native.missing() is None and torch.ops.mgrpo_native.mm_float32_(total, a, b, not first)


def accumulate_widened(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Compute :func:`accumulate` with float32 copies of the factors, at most WIDENED_BYTES of them at a time."""
    step = max(1, WIDENED_BYTES // (4 * max(1, a.shape[0] + b.shape[1])))
    if first:
        total.zero_()
    for inner in spans(a.shape[1], step):
        torch.addmm(total, a[:, inner].float(), b[inner].float(), out=total)


def rounds_once(product: torch.Size, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a matmul of this 16-bit dtype and result's shape adds up in float32 from end to end."""
    if device.type != "cuda":
        return True
    matmul = torch.backends.cuda.matmul
    if dtype == torch.float16:
        if matmul.allow_fp16_accumulation:
            return False
        splits = matmul.allow_fp16_reduced_precision_reduction
    else:
        splits = matmul.allow_bf16_reduced_precision_reduction
    return product.numel() >= UNSPLIT_FROM or not splits


def forward(
    hidden: Tensor,
    head: Head,
    labels: Tensor | None,
    passes: Passes,
    shape: TileShape,
    stored: Stored | None = None,
    *,
    even: bool = True,
) -> Tensor:
    """Return the state ``(6, N)`` of the rows of `hidden` ``(N, H)``, and store logits. Weights are the outer loop: each is read once.

    Tiles are as wide as each other, or with `even` False as wide as `shape`, but for the last.
    """
    number, vocab = hidden.shape[0], head.weight.shape[0]
    state = empty_state(number, hidden.device, passes.wanted)
    rows_at_once, columns_at_once = min(shape.rows, number), min(shape.columns, vocab)
    workspace = make_workspace(hidden, rows_at_once, columns_at_once, passes.padding, head.raw_dtype)
    hidden = hidden if number > shape.rows else operand(hidden)
    for columns in spans(vocab, shape.columns, ALIGNED if even else shape.columns):
        tile = None if stored is None else stored.tile(columns, passes.padding)
        weight = operand(head.weight[columns])
        for rows in spans(number, shape.rows):
            tile_head = of_tile(head, rows, columns, weight)
            x = place_of(workspace, rows, columns, passes.padding) if tile is None else tile[rows]
            passes.of_rows(rows).fill(x, operand(hidden[rows]), tile_head, take(labels, rows), state[:, rows])
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
    stored: Stored | None = None,
) -> Gradients:
    """Return the gradients of hidden (float32), weight and bias (their dtype): each tile read or computed again, then two matmuls.

    With weights as the outer loop a tile's part of the weight's gradient is complete before the next begins: 16-bit weights need
    only a tile of float32 accumulator, and none where all rows fit one tile.
    """
    number, vocab = hidden.shape[0], head.weight.shape[0]
    sums = Sums(hidden, head, need)
    weight = weight_gradient(hidden, head) if need[1] else None
    partial: Tensor | None = None
    rows_at_once, columns_at_once = min(shape.rows, number), min(shape.columns, vocab)
    gradients = make_workspace(hidden, rows_at_once, columns_at_once, passes.padding, gradient_dtype(head))
    logits = gradients
    if needs_two_tiles(head, passes):
        logits = make_workspace(hidden, rows_at_once, columns_at_once, passes.padding, head.raw_dtype)
    factor = hidden if number > shape.rows else operand(hidden)
    for columns in spans(vocab, shape.columns, ALIGNED):
        of_columns = operand(head.weight[columns])
        total = None if weight is None else weight[columns]
        if total is not None and total.dtype != torch.float32 and not is_one_matmul(total, number, head, shape):
            if partial is None or partial.shape != total.shape:
                partial = torch.empty_like(total, dtype=torch.float32)
            total = partial
        tile = None if stored is None else stored.tile(columns, passes.padding)
        for rows in spans(number, shape.rows):
            tile_head, of_rows = of_tile(head, rows, columns, of_columns), operand(factor[rows])
            x, grad = (place_of(each, rows, columns, passes.padding) for each in (logits, gradients))
            given = tile_head, take(labels, rows), coefficients[:, rows], logsumexp[rows], grad
            if stored is None or tile is None:
                passes.fill_gradient(x, of_rows, *given)
            else:
                passes.gradient(stored.take(tile, rows, x), *given)
            sums.add(grad, tile_head.weight, rows, columns)
            if total is not None:
                accumulate(total, grad.t(), of_rows, first=rows.start == 0)
        if weight is not None and partial is not None and total is partial and number:
            weight[columns].copy_(partial)
    return sums.hidden, weight, sums.bias_in(hidden.dtype)


def is_one_matmul(total: Tensor, number: int, head: Head, shape: TileShape) -> bool:
    """Return whether one matmul of 16-bit factors gives this part of the weight's gradient, its sums in float32."""
    fits = number <= shape.rows and gradient_dtype(head) == total.dtype
    return fits and rounds_once(total.shape, total.device, total.dtype)


def padded(width: int, padding: int) -> int:
    """Return the row stride of a tile that is this wide."""
    return -(-width // padding) * padding


def make_workspace(hidden: Tensor, rows: int, columns: int, padding: int, dtype: torch.dtype) -> Tensor:
    """Return room for tiles of at most this many rows and columns."""
    return hidden.new_empty(rows * padded(columns, padding), dtype=dtype)


def place_of(workspace: Tensor, rows: slice, columns: slice, padding: int, *, per_column: int = 0) -> Tensor:
    """Return the tile's place, behind `per_column` elements for each column on its left; with 0 it is always the same."""
    n, first = rows.stop - rows.start, per_column * columns.start
    width = columns.stop - columns.start
    stride = padded(width, padding)
    place = workspace[first : first + n * stride].view(n, stride)
    if stride > width and place.device.type == "cpu":
        # oneDNN with AMX multiplies the padding of a 16-bit row by 0: no NaN may lie there.
        place[:, width:].zero_()
    return place[:, :width]


def weight_gradient(hidden: Tensor, head: Head) -> Tensor:
    """Return room for the weight's gradient; zeros where there are no rows, and so no matmul writes it."""
    room = torch.empty_like(head.weight, memory_format=torch.contiguous_format)
    return room if hidden.shape[0] else room.zero_()


class Sums:
    """The float32 accumulators of the gradients of hidden and bias."""

    def __init__(self, hidden: Tensor, head: Head, need: tuple[bool, bool, bool]) -> None:
        self.hidden = hidden.new_empty(hidden.shape, dtype=torch.float32) if need[0] else None
        self.bias = torch.zeros_like(head.bias, dtype=torch.float32) if need[2] and head.bias is not None else None

    def add(self, grad: Tensor, weight: Tensor, rows: slice, columns: slice) -> None:
        """Add what a tile's gradient ``(n, C)`` gives for hidden and bias."""
        if self.hidden is not None:
            accumulate(self.hidden[rows], grad, weight, first=columns.start == 0)
        if self.bias is not None:
            self.bias[columns] += grad.sum(0, dtype=torch.float32)

    def bias_in(self, dtype: torch.dtype) -> Tensor | None:
        """Return the bias's gradient in this dtype."""
        return None if self.bias is None else self.bias.to(dtype)
