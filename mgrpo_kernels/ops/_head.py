"""Checks of the arguments that the ops over a language-model head share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mgrpo_kernels import checks
from mgrpo_kernels.ops._autocast import cast_weight
from mgrpo_kernels.sharded import is_dtensor

MIN_WORKSPACE = 64 * 1024


def check_head(hidden: Any, weight: Any, bias: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check a head's tensors against each other and cast them to the autocast dtype, if one is in force."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if is_dtensor(tensor):
            raise TypeError(
                f"{name}: expected a plain tensor, got a DTensor: call within the forward pass of the module that FSDP shards, "
                "pass full_tensor(), or pass to_local() of a sharded vocabulary with tp_group"
            )
    checks.check_tensor("hidden", hidden)
    if hidden.dim() < 1:
        raise ValueError("hidden: expected shape (..., H), got ()")
    checks.check_tensor("weight", weight, dim=2, device=hidden.device)
    if weight.shape[1] != hidden.shape[-1] or weight.shape[0] < 1:
        raise ValueError(
            f"weight: expected shape (V, {hidden.shape[-1]}) with V >= 1 to match hidden, got {checks.shape_text(weight.shape)}"
        )
    if bias is not None:
        checks.check_tensor("bias", bias, shape=weight.shape[:1], device=hidden.device)
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(dtype), cast_weight(weight, dtype), None if bias is None else bias.to(dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(f"{name}: expected hidden's dtype {hidden.dtype}, got {tensor.dtype}")
    return hidden, weight, bias


def flat_rows(hidden: Tensor) -> Tensor:
    """Return hidden states ``(..., H)`` as ``(N, H)``. N stays symbolic under torch.export, where ``Size.numel()`` is a fixed number."""
    return hidden.flatten(0, -2) if hidden.dim() > 1 else hidden.unsqueeze(0)


def check_head_options(logit_scale: Any, softcap: Any, workspace_bytes: Any) -> None:
    """Check the options of a head that are neither tensors nor process groups."""
    checks.check_number("logit_scale", logit_scale)
    if softcap is not None:
        checks.check_number("softcap", softcap, above=0.0)
    if workspace_bytes is not None:
        _check_int("workspace_bytes", workspace_bytes, MIN_WORKSPACE)


def _check_int(name: str, value: Any, at_least: int) -> None:
    if isinstance(value, (float, torch.SymFloat)):
        raise TypeError(f"{name}: expected an int, got {value}: pass int({name})")
    checks.check_number(name, value, at_least=at_least)


def check_kept(kept: Any, rows: torch.Size, device: torch.device) -> Tensor | None:
    """Return the kept ids as ``(N, K)``, or None."""
    if kept is None:
        return None
    checks.check_tensor("kept", kept, dtypes=checks.INTS, device=device)
    if kept.dim() < 1 or kept.shape[:-1] != rows or kept.shape[-1] < 1:
        wanted = checks.shape_text(rows).rstrip(",)") + ", K)" if rows else "(K,)"
        raise ValueError(f"kept: expected shape {wanted} with K >= 1, got {checks.shape_text(kept.shape)}")
    return kept.reshape(-1, kept.shape[-1])  # type: ignore[no-any-return]


def check_logits_dtype(logits_dtype: Any, dtype: torch.dtype) -> None:
    """Check the workspace's dtype against that of hidden and weight."""
    if not isinstance(logits_dtype, torch.dtype):
        raise TypeError(f"logits_dtype: expected a torch.dtype, got {type(logits_dtype).__name__}")
    if logits_dtype not in (torch.float32, dtype):
        raise ValueError(f"logits_dtype: expected torch.float32 or hidden's dtype {dtype}, got {logits_dtype}")


def check_gradient_tolerance(tolerance: Any) -> None:
    """Check the share of a row's gradient that may be left out."""
    if tolerance is not None:
        checks.check_number("gradient_tolerance", tolerance, above=0.0, below=1.0)


def check_tp_group(
    tp_group: dist.ProcessGroup | None, vocab_start: int | None, weight: Tensor
) -> tuple[str | None, int]:
    """Return the group's name (None: the vocabulary is whole) and this rank's first vocabulary entry."""
    if tp_group is None:
        if vocab_start not in (None, 0):
            raise ValueError(f"vocab_start: expected None or 0 without a tp_group, got {vocab_start}")
        return None, 0
    if vocab_start is None:
        sizes: list[int | None] = [None] * dist.get_world_size(tp_group)
        dist.all_gather_object(sizes, weight.shape[0], group=tp_group)
        vocab_start = sum(size or 0 for size in sizes[: dist.get_rank(tp_group)])
    _check_int("vocab_start", vocab_start, 0)
    return tp_group.group_name, vocab_start


def check_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    temperature_per_row: Tensor | None,
) -> None:
    """Check the tensors that the ops of a fused head have in common."""
    checks.check_tensor("hidden", hidden, dim=2)
    checks.check_tensor("weight", weight, dim=2)
    if weight.shape[0] < 1:
        raise ValueError(f"weight: expected shape (V, H) with V >= 1, got {checks.shape_text(weight.shape)}")
    (number, width), vocab = hidden.shape, weight.shape[0]
    checks.check_inside(
        hidden.device,
        ("weight", weight, (vocab, width), (hidden.dtype,)),
        ("bias", bias, (vocab,), (hidden.dtype,)),
        ("labels", labels, (number,), checks.INTS),
        ("mask", mask, (number,), checks.BOOL),
        ("temperature_per_row", temperature_per_row, (number,), checks.WIDE_FLOATS),
    )
