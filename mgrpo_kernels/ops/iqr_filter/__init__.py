"""Trajectory entropy, and the filter that prunes trajectories of low entropy within their group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels import backend as backends
from mgrpo_kernels import checks, sequences
from mgrpo_kernels.ops.iqr_filter import native, reference, triton
from mgrpo_kernels.ops.iqr_filter.specs import IqrFilter

OP = "iqr_filter"
backends.register(OP, reference=reference, native=native, triton=triton)

REDUCTIONS = ("mean", "sum")


def trajectory_entropy(
    entropy: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Return one entropy for each trajectory: the mean (or sum) of its tokens' entropies, in nats. Differentiable.

    Args:
        entropy: padded ``(B, L)``, or packed ``(N,)`` with `cu_seqlens`.
        mask: bool of that shape, True counts; what a masked position holds is never read.
        cu_seqlens: int32 or int64 ``(B+1,)``, ascending from 0 to N.
        reduction: "mean" or "sum".

    Returns:
        ``(B,)`` float32 (float64 for float64); NaN for a trajectory without tokens.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, device or option.
    """
    checks.check_tensor("entropy", entropy)
    checks.check_choice("reduction", reduction, REDUCTIONS)
    mask = checks.check_mask("mask", mask, entropy.shape, entropy.device)
    offsets = sequences.sequence_offsets("entropy", entropy, cu_seqlens)
    values = entropy if entropy.dtype == torch.float64 else entropy.float()
    counts = torch.ones_like(values)
    if mask is not None:
        values, counts = torch.where(mask, values, 0.0), mask.to(values.dtype)
    if cu_seqlens is None:
        total, count = values.sum(-1), counts.sum(-1)
    else:
        offsets = sequences.checked_offsets(offsets, values.shape[0], "cu_seqlens")
        total, count = (sequences.segment_reduce(each, offsets) for each in (values, counts))
    if reduction == "mean":
        return total / count  # 0 / 0 is the NaN of an empty trajectory
    return torch.where(count > 0, total, torch.nan)


def iqr_filter(
    entropy: Tensor,
    groups: int | Tensor,
    *,
    k: float = 0.75,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> IqrFilter:
    """Prune trajectories of unusually low entropy within their group (M-GRPO, arXiv 2512.13070).

    keep = entropy >= q1 - k (q3 - q1), with the group's quartiles as ``torch.quantile`` interpolates them ("linear"). The upper
    side is never pruned. One launch, no host sync, no gradient.

    Args:
        entropy: ``(B,)`` floating point, one a trajectory (:func:`trajectory_entropy`), in any unit.
        groups: group size G, or int offsets ``(P+1,)`` of contiguous groups, empty ones allowed.
        k: >= 0; larger prunes less.
        mask: ``(B,)`` bool; False takes a trajectory out of the quartiles, and it is not kept. A NaN entropy likewise.
        backend: ``reference``, ``native`` or ``triton``; None picks.

    Returns:
        IqrFilter: keep ``(B,)`` bool; lower, q1, q3 ``(P,)`` float32 (float64 for float64), NaN for a group with no valid member.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, device or range, or groups that do not fit.
        BackendUnavailable: `backend` cannot run here.
    """
    checks.check_tensor("entropy", entropy, dim=1)
    checks.check_number("k", k, at_least=0.0)
    mask = checks.check_mask("mask", mask, entropy.shape, entropy.device)
    offsets = sequences.group_offsets(groups, entropy.shape[0], entropy.device)
    values = entropy.detach() if entropy.dtype == torch.float64 else entropy.detach().float()
    name = backends.choose(OP, backend, values.device, values.dtype)
    return IqrFilter(*iqr_filter_op(values, offsets, mask, float(k), name))


@torch.library.custom_op("mgrpo_kernels::iqr_filter", mutates_args=())
def iqr_filter_op(
    entropy: Tensor,  # (B,) float32 or float64
    offsets: Tensor,  # (P+1,) int64
    mask: Tensor | None,  # (B,)
    k: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return keep ``(B,)``, lower, q1 and q3 ``(P,)``."""
    checks.check_tensor("entropy", entropy, dtypes=checks.WIDE_FLOATS, dim=1)
    sequences.check_offset_tensor("groups", offsets, entropy.shape[0], entropy.device)
    checks.check_inside(entropy.device, ("mask", mask, entropy.shape, checks.BOOL))
    sequences.check_offset_values("groups", offsets, entropy.shape[0])
    implementation = backends.implementation(OP, backend)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = implementation.forward(entropy.contiguous(), offsets, mask, k)
    return outputs


@iqr_filter_op.register_fake
def _(entropy: Tensor, offsets: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lower, q1, q3 = (entropy.new_empty(offsets.shape[0] - 1) for _ in range(3))
    return entropy.new_empty(entropy.shape, dtype=torch.bool), lower, q1, q3
