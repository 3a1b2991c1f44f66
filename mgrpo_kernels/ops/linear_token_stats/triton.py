"""Triton for GPUs: passes between the library's matmuls, one launch for each tile of logits and pass; or a matmul that includes them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels.backend import triton_unsupported as unsupported
from mgrpo_kernels.ops._statistics import EVERYTHING, Wanted
from mgrpo_kernels.ops._triton import tuning
from mgrpo_kernels.ops._triton.launch import launch, power_of_2, processors, row_tile
from mgrpo_kernels.ops.linear_token_stats import staircase, tiled
from mgrpo_kernels.ops.linear_token_stats.listing import SMALLEST, ListingPasses
from mgrpo_kernels.ops.linear_token_stats.specs import Entries, Head
from mgrpo_kernels.ops.linear_token_stats.staircase import entries_room

__all__ = [
    "FusedPasses",
    "GpuPasses",
    "backward",
    "entries_room",
    "forward",
    "logits_room",
    "passes_of",
    "sparse_backward",
    "sparse_forward",
    "unsupported",
]

STORED_QUARTERS = 3  # of the workspace, for logits stored until the backward pass; the last is for its tile
MATMUL_TILE = (
    128,
    256,
)  # rows and columns of the result that a multiprocessor computes at once in the library's large matmuls
FUSED_FROM = 1024  # rows: below, too few tiles for our own matmul to fill a GPU
TOP_THREADS = 128  # of the pass that lists logits; with more than one load in flight for each it spills on gfx942


class GpuPasses(tiled.Passes):
    """The two passes over a tile."""

    padding = tiled.ALIGNED

    def state(self, x: Tensor, head: Head, labels: Tensor | None, state: Tensor) -> None:
        """Fold the tile into the running state."""
        from mgrpo_kernels.ops.linear_token_stats import _triton_kernels as kernels

        tile = row_tile(x.shape[1], x.element_size(), *tuning.of(x.device).tile_state)
        plain = head.bias is None and head.softcap is None and head.logit_scale > 0
        launch(
            kernels.state_kernel,
            (x.shape[0],),
            x,
            x,
            head.bias,
            _contiguous(labels),
            *_numbers(head, state),
            x.shape[1],
            x.stride(0),
            *state.stride(),
            PLAIN=plain,
            **_sums(self.wanted),
            STEPS=tile.steps,
            LANES=tile.lanes,
            num_warps=tile.num_warps,
        )

    def gradient(
        self, x: Tensor, head: Head, labels: Tensor | None, coefficients: Tensor, logsumexp: Tensor, out: Tensor
    ) -> None:
        """Write the gradient of the tile to `out`."""
        from mgrpo_kernels.ops.linear_token_stats import _triton_kernels as kernels

        tile = row_tile(x.shape[1], x.element_size(), *tuning.of(x.device).tile_gradient)
        launch(
            kernels.gradient_kernel,
            (x.shape[0],),
            x,
            x,
            out,
            head.bias,
            _contiguous(labels),
            *_numbers(head, coefficients, logsumexp.contiguous()),
            x.shape[1],
            x.stride(0),
            out.stride(0),
            *coefficients.stride(),
            **_terms(self.gradients),
            STEPS=tile.steps,
            LANES=tile.lanes,
            num_warps=tile.num_warps,
        )


class TopPasses(ListingPasses, GpuPasses):
    """The same passes, which also list the largest logits of each row."""

    def state(self, x: Tensor, head: Head, labels: Tensor | None, state: Tensor) -> None:
        """Fold the tile into the running state, by the kernel of exact gradients, and then list its largest logits."""
        from mgrpo_kernels.ops.linear_token_stats import _entry_triton_kernels as kernels

        super().state(x, head, labels, state)
        tile = row_tile(x.shape[1], x.element_size(), TOP_THREADS, 1)
        launch(
            kernels.top_kernel,
            (x.shape[0],),
            x,
            x,
            head.bias,
            _contiguous(labels),
            *_numbers(head, state, *self.entries),
            head.vocab_start - self.first_column,
            x.shape[1],
            x.stride(0),
            *state.stride(),
            self.entries.rest.stride(0),
            self.smallest,
            ROOM=self.entries.room,
            BLOCK=tile.elements,
            num_warps=tile.num_warps,
        )


class FusedPasses(GpuPasses):
    """Our own matmul, which folds each tile of logits into the statistics before it leaves the registers."""

    in_registers = True

    def fill(self, x: Tensor | None, hidden: Tensor, head: Head, labels: Tensor | None, state: Tensor) -> None:
        """Fold the logits into the running state, and with `x` write them there too."""
        from mgrpo_kernels.ops.linear_token_stats import _fused_triton_kernels as kernels

        (number, width), columns = hidden.shape, head.weight.shape[0]
        block_n = tuning.of(hidden.device).fused_tile[1]
        states = torch.empty(-(-columns // block_n), 5, number, device=hidden.device, dtype=torch.float32)
        sizes = (number, columns, width, 0 if x is None else x.stride(0))
        self._launch(kernels.state_kernel, hidden, head, (_contiguous(labels), x, states), sizes, _sums(self.wanted))
        launch(
            kernels.merge_kernel,
            (-(-number // 32),),
            hidden,
            states,
            state,
            number,
            states.shape[0],
            columns,
            *state.stride(),
            **_sums(self.wanted),
            PARTS=32,
            ROWS=32,
            num_warps=4,
        )

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
        """Write the gradient of the logits to `out`; the logits themselves are not stored."""
        from mgrpo_kernels.ops.linear_token_stats import _fused_triton_kernels as kernels

        sizes = (hidden.shape[0], head.weight.shape[0], hidden.shape[1], out.stride(0), *coefficients.stride())
        tensors = (_contiguous(labels), out, coefficients, logsumexp.contiguous())
        self._launch(kernels.gradient_kernel, hidden, head, tensors, sizes, _terms(self.gradients))

    @staticmethod
    def _launch(
        kernel: Any,
        hidden: Tensor,
        head: Head,
        tensors: tuple[Any, ...],
        sizes: tuple[int, ...],
        asked: dict[str, bool],
    ) -> None:
        """Run a kernel with `tensors` from labels on, `temperature` after them, and `sizes` after `first`."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        block_m, block_n, block_k, stages, num_warps = tuning.of(hidden.device).fused_tile
        labels, *rest = tensors
        launch(
            kernel,
            (processors(hidden.device),),
            hidden,
            TensorDescriptor.from_tensor(hidden, [block_m, block_k]),
            TensorDescriptor.from_tensor(head.weight, [block_n, block_k]),
            head.bias,
            labels,
            *_numbers(head, *rest),
            *sizes,
            **asked,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_stages=stages,
            num_warps=num_warps,
        )


def _sums(wanted: Wanted) -> dict[str, bool]:
    """Return which of the sums that only some statistics need a kernel forms."""
    return {"WANT_EXPZ": wanted.entropy, "WANT_SUM": wanted.self_certainty}


def _terms(gradients: Wanted) -> dict[str, bool]:
    """Return which of the coefficients that only some statistics have a kernel reads."""
    return {"WANT_BETA": gradients.entropy, "WANT_GAMMA": gradients.self_certainty}


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _numbers(head: Head, *tensors: Tensor) -> tuple[Any, ...]:
    """Return the kernels' arguments from `temperature` to `first`, with their `tensors` in between."""
    per_row, number = (head.temperature, 1.0) if isinstance(head.temperature, Tensor) else (None, head.temperature)
    per_row = None if per_row is None else per_row.float()  # with one in float64 a kernel would compute all in float64
    softcap = None if head.softcap is None else float(head.softcap)
    return _contiguous(per_row), *tensors, 1.0 / number, float(head.logit_scale), softcap, head.vocab_start


def passes_of(hidden: Tensor, head: Head, wanted: Wanted = EVERYTHING, gradients: Wanted | None = None) -> GpuPasses:
    """Return what works on tiles: :class:`FusedPasses` where that is the device's tuned choice and the operands allow it."""
    operands = (hidden, head.weight)
    fits = all(
        # What tensor descriptors can describe; and float32 would be multiplied as TF32.
        each.element_size() == 2
        and each.stride(1) == 1
        and (each.stride(0) * 2) % 16 == 0
        and each.data_ptr() % 16 == 0
        for each in operands
    )
    chosen = tuning.of(hidden.device).matmul == "fused"
    passes = FusedPasses if chosen and fits and hidden.shape[0] >= FUSED_FROM else GpuPasses
    return passes(wanted, gradients)


def logits_room(number: int, head: Head) -> int:
    """Return how many raw logits of `number` rows, which may be symbolic, the forward pass stores for the backward pass.

    The more are stored, the narrower are the tiles of the others, each of which reads and writes the gradient of the hidden states.
    """
    tuned = tuning.of(head.weight.device)
    if tuned.matmul == "fused":  # computes logits again in registers
        return 0
    bound = head.workspace_bytes or tuned.workspace_bytes
    room = bound * STORED_QUARTERS // 4 // head.raw_dtype.itemsize
    return tiled.stored_room(number, tiled.padded(head.weight.shape[0], GpuPasses.padding), room)


def forward(
    hidden: Tensor, head: Head, labels: Tensor | None, wanted: Wanted, stored: tiled.Stored | None = None
) -> Tensor:
    """Return the state ``(6, N)`` of the rows of `hidden` ``(N, H)`` over this head's part of the vocabulary, and store logits."""
    tuned = tuning.of(hidden.device)
    passes = passes_of(hidden, head, wanted)
    if stored is not None:
        shape = backward_shape(stored.number, head, passes, stored.values.nbytes)
        return tiled.forward(hidden, head, labels, passes, shape, stored)
    if not isinstance(passes, FusedPasses):
        shape = forward_shape(hidden.shape[0], tuned, processors(hidden.device))
        return tiled.forward(
            hidden, head, labels, passes, shape.within(head.workspace_bytes, head.raw_dtype.itemsize), even=False
        )
    state = tiled.empty_state(hidden.shape[0], hidden.device, wanted)
    row_bytes = -(-head.weight.shape[0] // tuned.fused_tile[1]) * 5 * 4  # of the tiles' states
    at_once = max(1, (head.workspace_bytes or tuned.workspace_bytes) // row_bytes)
    for rows in tiled.spans(hidden.shape[0], at_once, tuned.fused_tile[0]):
        tile_head = tiled.of_tile(head, rows, slice(0, head.weight.shape[0]))
        passes.fill(None, hidden[rows], tile_head, None if labels is None else labels[rows], state[:, rows])
    return state


def forward_shape(number: int, tuned: tuning.Tuning, multiprocessors: int) -> tiled.TileShape:
    """Return the tile of forward: about as many logits as the tuned one, whose matmul keeps all multiprocessors busy to its end.

    With fewer rows it is wider, so that fewer matmuls are launched. Its columns are a multiple of what gives every multiprocessor the same
    number of the matmul's own tiles.
    """
    rows = min(max(1, number), tuned.forward_tile[0])
    of_rows = -(-rows // MATMUL_TILE[0])
    wave = MATMUL_TILE[1] * multiprocessors // math.gcd(of_rows, multiprocessors)
    columns = tuned.forward_tile[0] * tuned.forward_tile[1] // rows
    return tiled.TileShape(rows, wave * max(1, round(columns / wave)))


def backward(
    hidden: Tensor,  # (N, H)
    head: Head,
    labels: Tensor | None,  # (N,)
    coefficients: Tensor,  # (4, N)
    logsumexp: Tensor,  # (N,)
    need: tuple[bool, bool, bool],
    wanted: Wanted,
    stored: tiled.Stored | None = None,
) -> tiled.Gradients:
    """Return the gradients of hidden (float32), weight and bias (their dtype), None where `need` is False."""
    passes = passes_of(hidden, head, wanted)
    number, stored_bytes = (hidden.shape[0], 0) if stored is None else (stored.number, stored.values.nbytes)
    shape = backward_shape(number, head, passes, stored_bytes)
    return tiled.backward(hidden, head, labels, coefficients, logsumexp, need, passes, shape, stored)


def backward_shape(number: int, head: Head, passes: GpuPasses, stored_bytes: int = 0) -> tiled.TileShape:
    """Return the tile of backward: as much of the logits as the workspace holds, with all rows if they leave it wide enough.

    Each span of columns reads and writes the float32 gradient of the hidden states once, and each span of rows, where there are
    several, that of the weight: so both spans should be long.
    """
    tuned = tuning.of(head.weight.device)
    shape = tiled.TileShape(min(max(1, number), tuned.backward_rows), head.weight.shape[0])
    bound = (head.workspace_bytes or tuned.workspace_bytes) - stored_bytes
    return shape.within(bound, tiled.backward_bytes(head, passes))


def sparse_forward(
    hidden: Tensor, head: Head, labels: Tensor | None, wanted: Wanted, tolerance: float, entries: Entries
) -> Tensor:
    """Return the same state, and keep of each row what :func:`sparse_backward` needs in `entries`."""
    number, smallest = hidden.shape[0], SMALLEST * tolerance / len(head.weight)
    passes = TopPasses(wanted, entries, head.vocab_start, smallest)
    stored = logits_room(number, head) * head.raw_dtype.itemsize
    if stored:  # by the exact op: in tiles like its own the statistics have the same bits
        shape = backward_shape(number, head, passes, stored)
    else:
        shape = forward_shape(number, tuning.of(hidden.device), processors(hidden.device))
        shape = shape.within(head.workspace_bytes, head.raw_dtype.itemsize)
    return tiled.forward(hidden, head, labels, passes, shape, even=stored > 0)


def sparse_backward(
    hidden: Tensor,
    head: Head,
    labels: Tensor | None,
    coefficients: Tensor,
    logsumexp: Tensor,
    need: tuple[bool, bool, bool],
    wanted: Wanted,
    tolerance: float,
    entries: Entries,
) -> tiled.Gradients:
    """Return the gradients from the columns that any entry needs, or from all where that is nearly as much to multiply.

    Rows that cannot be held to the tolerance with what is listed are multiplied with all columns.
    """
    given, passes = (hidden, head, labels, coefficients, logsumexp, need), GpuPasses(wanted)
    needed, least = select(head, coefficients, logsumexp, tolerance, entries)
    stair = staircase.stair_of(needed, least) if len(needed) else None
    if stair is None or stair.products > staircase.DENSE_FROM * len(needed) * len(least):
        return tiled.backward(*given, passes, backward_shape(len(needed), head, passes))
    return staircase.backward(*given, passes, stair, head.workspace_bytes or tuning.of(hidden.device).workspace_bytes)


def select(
    head: Head, coefficients: Tensor, logsumexp: Tensor, tolerance: float, entries: Entries
) -> tuple[Tensor, Tensor]:
    """Return how many entries each row needs ``(N,)``, V + 1 if all, and the least of the needs of each column's rows ``(V,)``."""
    from mgrpo_kernels.ops.linear_token_stats import _entry_triton_kernels as kernels

    number, outside = len(logsumexp), head.weight.shape[0] + 1
    needed = torch.empty(number, dtype=torch.int32, device=logsumexp.device)
    least = needed.new_full(head.weight.shape[:1], outside)
    room = power_of_2(entries.room)
    if number:
        launch(
            kernels.select_kernel,
            (number,),
            needed,
            # Triton's interpreter writes a kernel's arguments back, unchanged; another backward pass would take that for a change of them.
            *(each.data for each in entries),
            coefficients,
            logsumexp.contiguous(),
            *_numbers(head, needed, least)[:-1],
            outside,
            entries.room,
            entries.rest.stride(0),
            *coefficients.stride(),
            tolerance,
            ROOM=room,
            num_warps=max(1, min(8, room // 512)),
        )
    return needed, least
