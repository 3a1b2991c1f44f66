"""Layers without gradients on a CPU: faster products where PyTorch's own float32 matmul is slow, and what is between the products."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mgrpo_kernels import _native
from mgrpo_kernels.ops.linear_token_stats import tiled

LARGE = 2**16
"""Elements of a weight from which another product is taken. Smaller ones, as the built-in model has, stay with PyTorch."""
FEW_ROWS = 96
"""Rows of which csrc/cpu/few_rows.cpp is the fastest product: it reads the weight where it lies. Others rearrange it, for all rows once."""


@functools.cache
def few_rows_is_faster() -> bool:
    """Return whether csrc/cpu/few_rows.cpp is faster than PyTorch's float32 matmul on this CPU, for few rows."""
    return _native.missing() is None and bool(torch.ops.mgrpo_native.few_rows_is_faster())


@functools.cache
def is_faster() -> bool:
    """Return whether oneDNN's float32 matmul is faster than PyTorch's on this CPU, found out from the native backend."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    ones = torch.ones(128, 128, dtype=torch.float32, device="cpu")
    return tiled.native_accumulate(torch.empty_like(ones), ones, ones, first=True)


def are_plain(*tensors: Tensor) -> bool:
    """Return whether an operation of these needs no more than float32 numbers on a CPU: no gradient, no subclass, no trace."""
    return (
        all(
            type(each) in (Tensor, torch.nn.Parameter) and each.dtype == torch.float32 and each.device.type == "cpu"
            for each in tensors
        )
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return :func:`torch.nn.functional.linear`, by the fastest product for a large float32 weight on a CPU if no gradient is required."""
    if weight.numel() >= LARGE and are_plain(x, weight):
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= FEW_ROWS and few_rows_is_faster():
            out: Tensor = torch.ops.mgrpo_native.few_rows(rows, weight, bias)
            return out.view(*x.shape[:-1], len(weight))
        if is_faster():
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    return torch.nn.functional.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return :func:`torch.nn.functional.rms_norm` over the last dimension; in one operation on a CPU if no gradient is required."""
    if _native.missing() is None and are_plain(x, weight):
        return torch.ops.mgrpo_native.rms_norm(x, weight, eps)  # type: ignore[no-any-return]
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k ``(rows, heads, D)`` turned by their positions (RoPE); cos and sin ``(rows, D)``, the first half of sin negated."""
    if _native.missing() is None and are_plain(q, k, cos, sin):
        return torch.ops.mgrpo_native.rotate(q, cos, sin), torch.ops.mgrpo_native.rotate(k, cos, sin)
    half = cos.shape[-1] // 2
    both = torch.cat([q, k], dim=1)
    turned = torch.cat([both[..., half:], both[..., :half]], dim=-1)
    q, k = torch.addcmul(both * cos.unsqueeze(1), turned, sin.unsqueeze(1)).split([q.shape[1], k.shape[1]], dim=1)
    return q, k


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, of one shape; in one operation on a CPU if no gradient is required."""
    if _native.missing() is None and are_plain(gate, up):
        return torch.ops.mgrpo_native.swiglu(gate, up)  # type: ignore[no-any-return]
    return torch.nn.functional.silu(gate) * up
