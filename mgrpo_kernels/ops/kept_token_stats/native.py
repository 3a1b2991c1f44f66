"""C++ for a CPU: csrc/cpu/kept*.cpp. Each row of the weight is read where it lies; nothing is gathered into memory."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels.backend import native_unsupported as unsupported

__all__ = ["hidden_gradient", "logits", "unsupported", "weight_gradient"]


def logits(hidden: Tensor, weight: Tensor, ids: Tensor, workspace_bytes: int | None) -> Tensor:
    """Return x ``(N, K)`` float32, the product of each row of `hidden` with its rows of the weight; 0 where ABSENT."""
    x: Tensor = torch.ops.mgrpo_native.kept_logits(hidden, weight, ids)
    return x


def hidden_gradient(grad: Tensor, weight: Tensor, ids: Tensor, workspace_bytes: int | None) -> Tensor:
    """Return ``(N, H)`` float32, the sum of each row's rows of the weight times `grad` ``(N, K)``."""
    total: Tensor = torch.ops.mgrpo_native.kept_hidden_gradient(grad, weight, ids)
    return total


def weight_gradient(
    grad: Tensor, hidden: Tensor, ids: Tensor, weight: Tensor, need_bias: bool, workspace_bytes: int | None
) -> tuple[Tensor, Tensor | None]:
    """Return ``(V, H)`` in hidden's dtype, and with `need_bias` ``(V,)`` float32; the reference has the definition."""
    total = hidden.new_empty(weight.shape)
    bias = torch.ops.mgrpo_native.kept_weight_gradient_(grad, hidden, ids, total, add=False)
    return total, bias if need_bias else None
