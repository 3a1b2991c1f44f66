"""Three matmuls on a GPU: the logits of a block of rows stay in the workspace until the loss has said what their gradient is."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels.backend import triton_unsupported as unsupported
from mgrpo_kernels.ops.linear_token_stats import tiled, triton
from mgrpo_kernels.ops.linear_token_stats.specs import Head

__all__ = ["forward_backward", "fusion", "unsupported"]

COLUMNS = 8192
# Each block of rows adds to the whole float32 gradient of the weight: half the rows, and that traffic would set the pace.
WORKSPACE_BYTES = 512 * 2**20


def fusion(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Return whether to fuse, and why."""
    return True, "3 matmuls take less time than 4"


def forward_backward(
    hidden: Tensor, head: Head, labels: Tensor, coefficients_of: tiled.CoefficientsOf, need: tuple[bool, bool, bool]
) -> tiled.Gradients:
    """Return the gradients of hidden, weight and bias, float32, None where `need` says so."""
    return tiled.forward_backward(
        hidden, head, labels, coefficients_of, need, triton.GpuPasses, COLUMNS, WORKSPACE_BYTES
    )
