"""C++ passes for CPU between the library's matmuls: csrc/cpu/linear_tile*.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels.backend import native_unsupported as unsupported
from mgrpo_kernels.ops._statistics import Wanted
from mgrpo_kernels.ops.linear_token_stats import tiled
from mgrpo_kernels.ops.linear_token_stats.listing import MAX_ROOM, SMALLEST, ListingPasses
from mgrpo_kernels.ops.linear_token_stats.specs import Entries, Head

__all__ = [
    "CpuPasses",
    "backward",
    "forward",
    "logits_room",
    "sparse_backward",
    "sparse_forward",
    "tile_bytes",
    "tile_shape",
    "unsupported",
]

WORKSPACE_BYTES = 224 * 2**20  # of a call with a gradient: a tile, and logits that are stored
ROOM_STEP = 16  # what the number of entries listed of a row is a multiple of: csrc/cpu/top_entries.h
VOCAB_PER_ENTRY = (
    16  # of the vocabulary for each entry: with more, gathered rows of the weight take as long as a dense product
)


def tile_shape(dtype: torch.dtype) -> tiled.TileShape:
    """Return the default tile: float32 matmuls lose a third of their rate on wider ones, 16-bit matmuls do not."""
    in_float32 = dtype == torch.float32 or not tiled.multiplies_16_bits(torch.device("cpu"), dtype)
    return tiled.TileShape(1024, 1024 if in_float32 else 2048)


class CpuPasses(tiled.Passes):
    """The two passes over a tile, which must be contiguous."""

    def state(self, x: Tensor, head: Head, labels: Tensor | None, state: Tensor) -> None:
        """Fold the tile into the running state."""
        torch.ops.mgrpo_native.tile_state_(x, *_numbers(head, x.dtype), labels, state, *_beside_logprob(self.wanted))

    def gradient(
        self, x: Tensor, head: Head, labels: Tensor | None, coefficients: Tensor, logsumexp: Tensor, out: Tensor
    ) -> None:
        """Write the gradient of the tile to `out`, which has the rows of a tile too."""
        given = coefficients, logsumexp, out, *_beside_logprob(self.gradients)
        torch.ops.mgrpo_native.tile_gradient_(x, *_numbers(head, x.dtype), labels, *given)


def _numbers(head: Head, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, float, float, float | None, int]:
    """Return the kernels' arguments between x, of `dtype`, and labels."""
    per_row, number = (head.temperature, 1.0) if isinstance(head.temperature, Tensor) else (None, head.temperature)
    return (
        None if head.bias is None else head.bias.to(dtype),
        per_row,
        number,
        head.logit_scale,
        head.softcap,
        head.vocab_start,
    )


def _beside_logprob(wanted: Wanted) -> tuple[bool, bool]:
    """Return the kernels' arguments want_entropy and want_self_certainty. Whether log-probs are wanted, `labels` tells them."""
    return wanted.entropy, wanted.self_certainty


class TopPasses(ListingPasses, CpuPasses):
    """The same passes, which also keep the largest logits of each row."""

    def state(self, x: Tensor, head: Head, labels: Tensor | None, state: Tensor) -> None:
        """Fold the tile into the running state and keep its largest logits."""
        column = head.vocab_start - self.first_column
        given = state, *_beside_logprob(self.wanted), *self.entries, column, self.smallest
        torch.ops.mgrpo_native.tile_state_top_(x, *_numbers(head, x.dtype), labels, *given)


def forward(
    hidden: Tensor, head: Head, labels: Tensor | None, wanted: Wanted, stored: tiled.Stored | None = None
) -> Tensor:
    """Return the state ``(6, N)`` of the rows of `hidden` ``(N, H)`` over this head's part of the vocabulary, and store logits."""
    return tiled.forward(hidden, head, labels, CpuPasses(wanted), _shape(head), stored)


def _shape(head: Head) -> tiled.TileShape:
    """Return the tile of a call, in both passes: so statistics are the same bits, whether or how exactly a gradient follows."""
    element_bytes = tiled.backward_bytes(head, CpuPasses())
    return tile_shape(head.weight.dtype).within(head.workspace_bytes, element_bytes)


def tile_bytes(number: int, head: Head) -> int:
    """Return what a tile of the backward pass takes for `number` rows, which may be symbolic."""
    rows, columns = _shape(head)
    tile = torch.sym_min(number, rows) * min(columns, head.weight.shape[0])
    return tile * tiled.backward_bytes(head, CpuPasses())  # type: ignore[no-any-return]


def logits_room(number: int, head: Head) -> int:
    """Return how many raw logits of `number` rows, which may be symbolic, the forward pass stores for the backward pass."""
    room = (head.workspace_bytes or WORKSPACE_BYTES) - tile_bytes(number, head)
    return tiled.stored_room(number, head.weight.shape[0], torch.sym_max(0, room) // head.raw_dtype.itemsize)


def sparse_forward(
    hidden: Tensor, head: Head, labels: Tensor | None, wanted: Wanted, tolerance: float, entries: Entries
) -> Tensor:
    """Return the same state, and keep of each row what :func:`sparse_backward` needs in `entries`."""
    passes = TopPasses(wanted, entries, head.vocab_start, SMALLEST * tolerance / head.weight.shape[0])
    return tiled.forward(hidden, head, labels, passes, _shape(head))


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
    passes, shape = CpuPasses(wanted), _shape(head)
    return tiled.backward(hidden, head, labels, coefficients, logsumexp, need, passes, shape, stored)


def entries_room(vocab: int) -> int:
    """Return for how many logits of a row there is room between the forward and the backward pass."""
    return min(MAX_ROOM, (vocab // VOCAB_PER_ENTRY // ROOM_STEP + 1) * ROOM_STEP)


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
    """Return the gradients from the kept entries alone, as far as their rows can be held to the tolerance, and all of the other rows'."""
    per_row, number = (head.temperature, 1.0) if isinstance(head.temperature, Tensor) else (None, head.temperature)
    ops = torch.ops.mgrpo_native
    ids, gradient, outside = ops.entry_gradient(
        *entries, coefficients, logsumexp, per_row, number, head.logit_scale, head.softcap, tolerance
    )
    grad_hidden: Tensor | None = ops.kept_hidden_gradient(gradient, head.weight, ids) if need[0] else None
    grad_weight = grad_bias = None
    dense = outside.nonzero().squeeze(-1)
    if dense.numel():
        rows = head._replace(temperature=per_row[dense] if per_row is not None else number)
        of_labels = None if labels is None else labels[dense]
        of_rows, grad_weight, grad_bias = backward(
            hidden[dense], rows, of_labels, coefficients[:, dense], logsumexp[dense], need, wanted
        )
        if grad_hidden is not None and of_rows is not None:
            grad_hidden.index_add_(0, dense, of_rows)
    if need[1] or need[2]:
        total = tiled.weight_gradient(hidden, head) if grad_weight is None else grad_weight
        bias = ops.kept_weight_gradient_(gradient, hidden, ids, total, add=grad_weight is not None)
        grad_weight = total if need[1] else None
        if need[2]:
            grad_bias = (bias if grad_bias is None else bias + grad_bias).to(hidden.dtype)
    return grad_hidden, grad_weight, grad_bias
