"""Triton passes for GPUs between the library's matmuls: one launch for each tile of logits and pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mgrpo_kernels.backend import triton_unsupported as unsupported
from mgrpo_kernels.ops._triton import tuning
from mgrpo_kernels.ops._triton.launch import launch, row_tile
from mgrpo_kernels.ops.linear_token_stats import tiled
from mgrpo_kernels.ops.linear_token_stats.specs import Head

__all__ = ["GpuPasses", "backward", "forward", "unsupported"]


class GpuPasses:
    """The two passes over a tile."""

    padding = tiled.ALIGNED

    @staticmethod
    def state(x: Tensor, head: Head, labels: Tensor | None, state: Tensor) -> None:
        """Fold the tile into the running state."""
        from mgrpo_kernels.ops.linear_token_stats import _triton_kernels as kernels

        tile = row_tile(x.shape[1], x.element_size(), *tuning.of(x.device).tile_state)
        launch(
            kernels.state_kernel, (x.shape[0],), x,
            x, head.bias, _contiguous(labels), *_numbers(head, state), x.shape[1], x.stride(0), *state.stride(),
            STEPS=tile.steps, LANES=tile.lanes, num_warps=tile.num_warps,
        )  # fmt: skip

    @staticmethod
    def gradient_(x: Tensor, head: Head, labels: Tensor | None, coefficients: Tensor, logsumexp: Tensor) -> None:
        """Overwrite the tile with its gradient."""
        from mgrpo_kernels.ops.linear_token_stats import _triton_kernels as kernels

        tile = row_tile(x.shape[1], x.element_size(), *tuning.of(x.device).tile_gradient)
        launch(
            kernels.gradient_kernel, (x.shape[0],), x,
            x, head.bias, _contiguous(labels), *_numbers(head, coefficients, logsumexp.contiguous()),
            x.shape[1], x.stride(0), *coefficients.stride(),
            STEPS=tile.steps, LANES=tile.lanes, num_warps=tile.num_warps,
        )  # fmt: skip


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _numbers(head: Head, *tensors: Tensor) -> tuple[Any, ...]:
    """Return the kernels' arguments from `temperature` to `first`, with their `tensors` in between."""
    per_row, number = (head.temperature, 1.0) if isinstance(head.temperature, Tensor) else (None, head.temperature)
    softcap = None if head.softcap is None else float(head.softcap)
    return _contiguous(per_row), *tensors, 1.0 / number, float(head.logit_scale), softcap, head.vocab_start


def forward(hidden: Tensor, head: Head, labels: Tensor | None) -> Tensor:
    """Return the state ``(6, N)`` of the rows of `hidden` ``(N, H)`` over this head's part of the vocabulary."""
    shape = tiled.TileShape(*tuning.of(hidden.device).forward_tile)
    return tiled.forward(hidden, head, labels, GpuPasses, shape.within(head.workspace_bytes, hidden.element_size()))


def backward(
    hidden: Tensor,  # (N, H)
    head: Head,
    labels: Tensor | None,  # (N,)
    coefficients: Tensor,  # (4, N)
    logsumexp: Tensor,  # (N,)
    need: tuple[bool, bool, bool],
) -> tiled.Gradients:
    """Return the gradients of hidden (float32), weight and bias (their dtype), None where `need` says so."""
    shape = backward_shape(hidden, head)
    return tiled.backward(hidden, head, labels, coefficients, logsumexp, need, GpuPasses, shape)


def backward_shape(hidden: Tensor, head: Head) -> tiled.TileShape:
    """Return the tile of backward: as much of the logits as the workspace holds, with all rows if they leave it wide enough.

    Each span of columns reads and writes the float32 gradient of the hidden states once, and each span of rows, where there are
    several, that of the weight: so both spans should be long.
    """
    tuned = tuning.of(hidden.device)
    shape = tiled.TileShape(min(max(1, hidden.shape[0]), tuned.backward_rows), head.weight.shape[0])
    return shape.within(head.workspace_bytes or tuned.workspace_bytes, hidden.element_size())
