"""C++ passes for CPU between the library's matmuls: csrc/cpu/linear_tile*.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels.backend import native_unsupported as unsupported
from mgrpo_kernels.ops.linear_token_stats import tiled
from mgrpo_kernels.ops.linear_token_stats.specs import Head

__all__ = ["CpuPasses", "backward", "forward", "tile_shape", "unsupported"]


def tile_shape(dtype: torch.dtype) -> tiled.TileShape:
    """Return the default tile: float32 matmuls lose a third of their rate on wider ones, 16-bit matmuls do not."""
    return tiled.TileShape(1024, 1024 if dtype == torch.float32 else 2048)


class CpuPasses(tiled.Passes):
    """The two passes over a tile, which must be contiguous."""

    def state(self, x: Tensor, head: Head, labels: Tensor | None, state: Tensor) -> None:
        """Fold the tile into the running state."""
        torch.ops.mgrpo_native.tile_state_(x, *_numbers(head, x.dtype), labels, state)

    def gradient(
        self, x: Tensor, head: Head, labels: Tensor | None, coefficients: Tensor, logsumexp: Tensor, out: Tensor
    ) -> None:
        """Write the gradient of the tile to `out`, which has the rows of a tile too."""
        torch.ops.mgrpo_native.tile_gradient_(x, *_numbers(head, x.dtype), labels, coefficients, logsumexp, out)


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


def forward(hidden: Tensor, head: Head, labels: Tensor | None) -> Tensor:
    """Return the state ``(6, N)`` of the rows of `hidden` ``(N, H)`` over this head's part of the vocabulary."""
    shape = tile_shape(hidden.dtype).within(head.workspace_bytes, head.raw_dtype.itemsize)
    return tiled.forward(hidden, head, labels, CpuPasses(), shape)


def backward(
    hidden: Tensor,  # (N, H)
    head: Head,
    labels: Tensor | None,  # (N,)
    coefficients: Tensor,  # (4, N)
    logsumexp: Tensor,  # (N,)
    need: tuple[bool, bool, bool],
) -> tiled.Gradients:
    """Return the gradients of hidden (float32), weight and bias (their dtype), None where `need` is False."""
    passes = CpuPasses()
    shape = tile_shape(hidden.dtype).within(head.workspace_bytes, tiled.backward_bytes(head, passes))
    return tiled.backward(hidden, head, labels, coefficients, logsumexp, need, passes, shape)
