"""Triton for GPUs: each program gathers the rows that it needs into registers; nothing is gathered into memory."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels.backend import triton_unsupported as unsupported
from mgrpo_kernels.ops._triton.launch import launch, power_of_2

__all__ = ["hidden_gradient", "logits", "unsupported", "weight_gradient"]

ENTRIES = 8  # rows that a program has in flight
COLUMNS = 512  # of each: 4 warps load 16 bytes a thread
WARPS = 4


def _columns(width: int) -> int:
    return min(COLUMNS, max(32, power_of_2(width)))


def _rows(x: Tensor) -> Tensor:
    """Return a matrix whose rows are contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()


def logits(hidden: Tensor, weight: Tensor, ids: Tensor, workspace_bytes: int | None) -> Tensor:
    """Return x ``(N, K)`` float32, the product of each row of `hidden` with its rows of the weight; 0 where ABSENT."""
    from mgrpo_kernels.ops.kept_token_stats import _triton_kernels as kernels

    hidden, weight, x = _rows(hidden), _rows(weight), torch.empty_like(ids, dtype=torch.float32)
    if x.numel():
        launch(
            kernels.logits_kernel,
            (ids.shape[0], -(-ids.shape[1] // ENTRIES)),
            hidden,
            hidden,
            weight,
            ids,
            x,
            *weight.shape,
            ids.shape[1],
            hidden.stride(0),
            weight.stride(0),
            ENTRIES=ENTRIES,
            COLUMNS=_columns(weight.shape[1]),
            num_warps=WARPS,
        )
    return x


def hidden_gradient(grad: Tensor, weight: Tensor, ids: Tensor, workspace_bytes: int | None) -> Tensor:
    """Return ``(N, H)`` float32, the sum of each row's rows of the weight times `grad` ``(N, K)``."""
    from mgrpo_kernels.ops.kept_token_stats import _triton_kernels as kernels

    weight, out = _rows(weight), grad.new_empty(ids.shape[0], weight.shape[1])
    columns = _columns(weight.shape[1])
    if out.numel():
        launch(
            kernels.hidden_gradient_kernel,
            (ids.shape[0], -(-weight.shape[1] // columns)),
            grad,
            grad,
            weight,
            ids,
            out,
            *weight.shape,
            ids.shape[1],
            weight.stride(0),
            ENTRIES=ENTRIES,
            COLUMNS=columns,
            num_warps=WARPS,
        )
    return out


def weight_gradient(
    grad: Tensor, hidden: Tensor, ids: Tensor, weight: Tensor, need_bias: bool, workspace_bytes: int | None
) -> tuple[Tensor, Tensor | None]:
    """Return ``(V, H)`` in hidden's dtype, and with `need_bias` ``(V,)`` float32; the reference has the definition.

    A program sums the entries of one vocabulary id, in the order of their tokens: no atomics, so the same bits every time.
    """
    from mgrpo_kernels.ops.kept_token_stats import _triton_kernels as kernels

    hidden, (vocab, width) = _rows(hidden), weight.shape
    by_id, order = ids.flatten().sort(stable=True)
    bounds = torch.searchsorted(by_id, torch.arange(vocab + 1, device=ids.device, dtype=ids.dtype))
    total = torch.empty(vocab, width, device=grad.device, dtype=hidden.dtype)
    bias = grad.new_empty(vocab) if need_bias else None
    columns = _columns(width)
    launch(
        kernels.weight_gradient_kernel,
        (vocab, -(-width // columns)),
        grad,
        grad,
        hidden,
        order,
        bounds,
        total,
        bias,
        width,
        ids.shape[1],
        hidden.stride(0),
        ENTRIES=ENTRIES,
        COLUMNS=columns,
        num_warps=WARPS,
    )
    return total, bias
