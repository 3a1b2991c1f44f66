"""Three matmuls on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mgrpo_kernels.backend import native_unsupported as unsupported
from mgrpo_kernels.ops._statistics import Wanted
from mgrpo_kernels.ops.linear_policy_loss import three_matmuls
from mgrpo_kernels.ops.linear_token_stats import native, tiled
from mgrpo_kernels.ops.linear_token_stats.specs import Head

__all__ = ["forward_backward", "fusion", "scale_", "unsupported"]

COLUMNS = 1024


def fusion(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Return whether to fuse, and why."""
    if dtype == torch.float16:
        return False, three_matmuls.FLOAT16
    if dtype == torch.float32 or tiled.multiplies_16_bits(device, dtype):
        return True, three_matmuls.FEWER
    return False, "this CPU multiplies 16-bit factors in float32, and two ops convert fewer of them"


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
    passes = native.CpuPasses(three_matmuls.WANTED, gradients)
    return three_matmuls.forward_backward(
        hidden, head, labels, coefficients_of, need, passes, COLUMNS, native.WORKSPACE_BYTES, live
    )


def scale_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply `grads` in place by `factor`, 0-d. Nearly always it is 1."""
    if factor != 1:
        torch._foreach_mul_(list(grads), factor.item())
