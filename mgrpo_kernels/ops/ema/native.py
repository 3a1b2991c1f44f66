"""C++ for CPU: one pass over all tensors in chunks, whatever their dtypes. csrc/cpu/ema*.cpp."""

from __future__ import annotations

import torch

from mgrpo_kernels.backend import native_unsupported as unsupported
from mgrpo_kernels.ops.ema.specs import Batch

__all__ = ["unsupported", "update_"]


def update_(batch: Batch) -> None:
    """Update every ``batch.ema`` and write every ``batch.emit``."""
    torch.ops.mgrpo_native.ema_update_(
        batch.ema,
        batch.params,
        batch.emit,
        batch.decay.item(),
        [word for pair in batch.keys for word in pair],
        [number for span in batch.spans for number in span],
    )
