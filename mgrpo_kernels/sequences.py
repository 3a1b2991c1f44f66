"""Padded batches, packed batches, groups: the only place that knows these layouts.

Groups: an int G says that every G rollouts in a row belong to one prompt; int offsets ``(P+1,)`` say where each prompt's
rollouts begin and end, so that groups may differ in size and be empty.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels import checks


def group_offsets(groups: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """Return the offsets ``(P+1,)``, int64 on `device`, of the groups of `batch` rollouts.

    Args:
        groups: group size G, which must divide `batch`; or int32 / int64 offsets ``(P+1,)``: ascending, from 0 to `batch`.
        batch: number of rollouts B.
        device: where the offsets are wanted. Given offsets must already be there.

    Raises:
        TypeError: neither an int nor an integer tensor.
        ValueError: G does not divide B or is below 1; offsets of another shape or device; offsets that do not ascend from 0 to B
            (values are checked on CPU tensors only: a GPU tensor's would cost a host sync).
    """
    if isinstance(groups, Tensor):
        checks.check_tensor("groups", groups, dtypes=checks.INTS, dim=1, device=device)
        if groups.shape[0] < 1:
            raise ValueError("groups: expected offsets of shape (P+1,), got an empty tensor")
        return groups.to(torch.int64)
    if isinstance(groups, bool) or not isinstance(groups, (int, torch.SymInt)):
        raise TypeError(f"groups: expected an int or int offsets (P+1,), got {type(groups).__name__}")
    if groups < 1 or batch % groups != 0:
        raise ValueError(f"groups: expected a group size >= 1 that divides the {batch} rollouts, got {groups}")
    return torch.arange(0, batch + 1, groups, device=device, dtype=torch.int64)


def check_offset_values(name: str, offsets: Tensor, total: int) -> None:
    """Raise ValueError unless offsets ascend from 0 to `total` (read on CPU tensors only: no host sync on a GPU)."""
    if offsets.device.type != "cpu":
        return
    if int(offsets[0]) != 0 or int(offsets[-1]) != total or bool((offsets.diff() < 0).any()):
        raise ValueError(f"{name}: expected ascending offsets from 0 to {total}, got {offsets.tolist()[:16]}")


def check_offset_tensor(name: str, offsets: Tensor, total: int, device: torch.device) -> None:
    """Raise TypeError or ValueError unless offsets are int64 ``(parts+1,)`` on `device`, with a part if there is anything in it."""
    checks.check_tensor(name, offsets, dtypes=(torch.int64,), dim=1, device=device)
    _check_parts(name, offsets, total)


def _check_parts(name: str, offsets: Tensor, total: int) -> None:
    if offsets.shape[0] < 1 or (offsets.shape[0] == 1 and total > 0):
        raise ValueError(f"{name}: expected ascending offsets from 0 to {total}, got shape ({offsets.shape[0]},)")


@torch.library.custom_op("mgrpo_kernels::checked_offsets", mutates_args=())
def checked_offsets(offsets: Tensor, total: int, name: str) -> Tensor:
    """Return offsets ``(B+1,)`` that ascend from 0 to `total`, int64: checked on a CPU, kept within bounds on a GPU.

    An op of its own, so that a compiled graph checks them too.

    Raises:
        ValueError: wrong shape, or on a CPU wrong values. Errors call the offsets `name`.
    """
    offsets = checks.check_tensor(name, offsets, dtypes=checks.INTS).to(torch.int64, copy=True)
    check_offset_tensor(name, offsets, total, offsets.device)
    check_offset_values(name, offsets, total)
    return bounded(offsets, total)


@checked_offsets.register_fake
def _(offsets: Tensor, total: int, name: str) -> Tensor:
    return torch.empty_like(offsets, dtype=torch.int64)


def bounded(offsets: Tensor, total: int) -> Tensor:
    """Return offsets kept within [0, total] on a GPU, where nothing has checked their values. No host sync."""
    return offsets if offsets.device.type == "cpu" else offsets.clamp(0, total)


def group_index(offsets: Tensor, batch: int) -> Tensor:
    """Return each rollout's group, ``(B,)`` int64, from offsets ``(P+1,)``. No host sync."""
    index = torch.searchsorted(offsets[1:].contiguous(), torch.arange(batch, device=offsets.device), right=True)
    return bounded(index, offsets.shape[0] - 2)


def sequence_offsets(name: str, values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return the offsets ``(B+1,)``, int64, of the sequences in `values`: padded ``(B, L)``, or packed ``(N,)`` with `cu_seqlens`.

    Raises:
        TypeError: cu_seqlens is no int32 or int64 tensor.
        ValueError: neither padded nor packed, or cu_seqlens of the wrong shape or device. Its values are for
            :func:`check_offset_values`.
    """
    if cu_seqlens is None:
        if values.dim() != 2:
            raise ValueError(
                f"{name}: expected padded (B, L), or packed (N,) with cu_seqlens, got {checks.shape_text(values.shape)} without"
            )
        batch, length = values.shape
        return torch.arange(batch + 1, device=values.device, dtype=torch.int64) * length
    checks.check_tensor("cu_seqlens", cu_seqlens, dtypes=checks.INTS, dim=1, device=values.device)
    if values.dim() != 1:
        raise ValueError(f"{name}: expected packed (N,) with cu_seqlens, got {checks.shape_text(values.shape)}")
    _check_parts("cu_seqlens", cu_seqlens, values.shape[0])
    return cu_seqlens.to(torch.int64)


def segment_reduce(values: Tensor, offsets: Tensor, how: str = "sum") -> Tensor:
    """Reduce ``(T,)`` within each segment of offsets ``(B+1,)`` by "sum", "max" or "min": ``(B,)``.

    The same bits every time, which scatter-adds do not give on a GPU.
    """
    if values.numel() == 0 or offsets.shape[0] == 1:
        nothing = {"sum": 0.0, "max": -torch.inf, "min": torch.inf}[how]
        return values.new_full((offsets.shape[0] - 1,), nothing)
    return torch.segment_reduce(values, how, offsets=bounded(offsets, values.shape[0]), unsafe=True)
