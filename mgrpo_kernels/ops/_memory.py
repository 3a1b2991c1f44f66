"""Memory for large tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mgrpo_kernels import _native


def large(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a new tensor, on a CPU in huge pages where the extension can ask for them: their first write costs less."""
    room = torch.empty(shape, device=device, dtype=dtype)
    if device.type == "cpu" and _native.missing() is None:
        torch.ops.mgrpo_native.advise_huge_pages_(room)
    return room
