"""Triton for GPUs: one launch, a program for each group."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels.backend import triton_unsupported as unsupported
from mgrpo_kernels.ops._triton.launch import launch

__all__ = ["forward", "unsupported"]

_BLOCK = 32  # members compared with as many others at once


def forward(entropy: Tensor, offsets: Tensor, mask: Tensor | None, k: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return keep ``(B,)``, lower, q1, q3 ``(P,)``."""
    groups = offsets.shape[0] - 1
    keep = torch.empty(entropy.shape, dtype=torch.bool, device=entropy.device)
    lower, q1, q3 = (entropy.new_empty(groups) for _ in range(3))
    if groups:
        from mgrpo_kernels.ops.iqr_filter import _triton_kernels as kernels

        # Without contraction, so that the limit has the reference's bits: at k = 0 members lie exactly on it.
        launch(
            kernels.filter_kernel,
            (groups,),
            entropy,
            entropy,
            offsets.contiguous(),
            None if mask is None else mask.contiguous().view(torch.uint8),
            keep.view(torch.uint8),
            lower,
            q1,
            q3,
            float(k),
            entropy.shape[0],
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return keep, lower, q1, q3
