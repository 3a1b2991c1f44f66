"""C++ for CPU: csrc/cpu/iqr_filter.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels.backend import native_unsupported as unsupported

__all__ = ["forward", "unsupported"]


def forward(entropy: Tensor, offsets: Tensor, mask: Tensor | None, k: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return keep ``(B,)``, lower, q1, q3 ``(P,)``."""
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.mgrpo_native.iqr_filter(entropy, offsets, mask, k)
    return outputs
