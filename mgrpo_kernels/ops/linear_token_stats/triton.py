"""Triton passes for GPUs between the library's matmuls: one launch for each tile of logits and pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels.backend import triton_unsupported as unsupported
from mgrpo_kernels.ops._triton.launch import RowTile, launch, row_tile
from mgrpo_kernels.ops.linear_token_stats import tiled
from mgrpo_kernels.ops.linear_token_stats.specs import Head

__all__ = ["GpuPasses", "backward", "forward", "tile_shape", "unsupported"]


def tile_shape(dtype: torch.dtype) -> tiled.TileShape:
    """Return a tile of 128 MiB (16-bit) or 256 MiB (float32): large enough for a matmul to run at its full rate."""
    return tiled.TileShape(8192, 8192)


class GpuPasses:
    """The two passes over a tile."""

    @staticmethod
    def state(x: Tensor, head: Head, labels: Tensor | None, state: Tensor) -> None:
        """Fold the tile into the running state."""
        from mgrpo_kernels.ops.linear_token_stats import _triton_kernels as kernels

        tile = _row_tile(x)
        launch(
            kernels.state_kernel, (x.shape[0],), x,
            x, head.bias, _contiguous(labels), *_numbers(head, state), x.shape[1], x.stride(0), *state.stride(),
            STEPS=tile.steps, LANES=tile.lanes, num_warps=tile.num_warps,
        )  # fmt: skip

    @staticmethod
    def gradient_(x: Tensor, head: Head, labels: Tensor | None, coefficients: Tensor, logsumexp: Tensor) -> None:
        """Overwrite the tile with its gradient."""
        from mgrpo_kernels.ops.linear_token_stats import _triton_kernels as kernels

        tile = _row_tile(x)
        launch(
            kernels.gradient_kernel, (x.shape[0],), x,
            x, head.bias, _contiguous(labels), *_numbers(head, coefficients, logsumexp.contiguous()),
            x.shape[1], x.stride(0), *coefficients.stride(),
            STEPS=tile.steps, LANES=tile.lanes, num_warps=tile.num_warps,
        )  # fmt: skip


def _row_tile(x: Tensor) -> RowTile:
    # Tiles are a few thousand columns wide: four warps a row, so that what crosses threads at its end weighs less.
    return row_tile(x.shape[1], x.element_size(), steps=4, threads=128)


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _numbers(head: Head, *tensors: Tensor) -> tuple[Any, ...]:
    """Return the kernels' arguments from `temperature` to `first`, with their `tensors` in between."""
    per_row, number = (head.temperature, 1.0) if isinstance(head.temperature, Tensor) else (None, head.temperature)
    softcap = None if head.softcap is None else float(head.softcap)
    return _contiguous(per_row), *tensors, 1.0 / number, float(head.logit_scale), softcap, head.vocab_start


def forward(hidden: Tensor, head: Head, labels: Tensor | None) -> Tensor:
    """Return the state ``(6, N)`` of the rows of `hidden` ``(N, H)`` over this head's part of the vocabulary."""
    return tiled.forward(hidden, head, labels, GpuPasses, tile_shape(hidden.dtype))


def backward(
    hidden: Tensor,  # (N, H)
    head: Head,
    labels: Tensor | None,  # (N,)
    coefficients: Tensor,  # (4, N)
    logsumexp: Tensor,  # (N,)
    need: tuple[bool, bool, bool],
) -> tiled.Gradients:
    """Return the gradients of hidden (float32), weight and bias (their dtype), None where `need` says so."""
    return tiled.backward(hidden, head, labels, coefficients, logsumexp, need, GpuPasses, tile_shape(hidden.dtype))
