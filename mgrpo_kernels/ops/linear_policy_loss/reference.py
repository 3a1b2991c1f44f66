"""The definition is the composition of the general ops."""

from __future__ import annotations

import torch

from mgrpo_kernels.backend import reference_unsupported as unsupported

__all__ = ["fusion", "unsupported"]


def fusion(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Return whether to fuse, and why."""
    return False, "the reference backend composes"
