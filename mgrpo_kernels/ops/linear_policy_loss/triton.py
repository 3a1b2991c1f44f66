"""Three matmuls on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mgrpo_kernels.backend import triton_unsupported as unsupported
from mgrpo_kernels.ops._statistics import Wanted
from mgrpo_kernels.ops._triton import tuning
from mgrpo_kernels.ops._triton.launch import launch, processors
from mgrpo_kernels.ops.linear_policy_loss import three_matmuls
from mgrpo_kernels.ops.linear_token_stats import tiled, triton
from mgrpo_kernels.ops.linear_token_stats.specs import Head

__all__ = ["forward_backward", "fusion", "scale_", "unsupported"]

_SCALE_BLOCK = 4096


def fusion(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Return whether to fuse, and why."""
    if dtype == torch.float16:
        return False, three_matmuls.FLOAT16
    return True, three_matmuls.FEWER


def forward_backward(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    coefficients_of: three_matmuls.CoefficientsOf,
    need: tuple[bool, bool, bool],
    live: int,
    gradients: Wanted,
) -> tiled.Gradients:
    """Return the gradients of hidden and bias (float32) and weight (its dtype), None where `need` is False.

    Rows from `live` on have none.
    """
    passes = triton.passes_of(hidden, head, three_matmuls.WANTED, gradients)
    workspace_bytes = tuning.of(hidden.device).workspace_bytes
    return three_matmuls.forward_backward(
        hidden, head, labels, coefficients_of, need, passes, None, workspace_bytes, live
    )


def scale_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply contiguous `grads` in place by `factor`, 0-d float32. Nearly always it is 1: then nothing is read or written."""
    from mgrpo_kernels.ops.linear_policy_loss import _triton_kernels as kernels

    for grad in grads:
        if grad.numel():
            programs = min(-(-grad.numel() // _SCALE_BLOCK), 8 * processors(grad.device))
            launch(kernels.scale_kernel, (programs,), grad, grad, factor, grad.numel(), BLOCK=_SCALE_BLOCK, num_warps=8)
