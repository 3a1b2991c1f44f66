"""The definition, in plain PyTorch, for all groups at once and without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels import sequences
from mgrpo_kernels.backend import reference_unsupported as unsupported

__all__ = ["forward", "unsupported"]


def forward(entropy: Tensor, offsets: Tensor, mask: Tensor | None, k: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return keep ``(B,)``, lower, q1, q3 ``(P,)``, of entropies ``(B,)`` in groups given by offsets ``(P+1,)``."""
    batch = entropy.shape[0]
    offsets = sequences.bounded(offsets, batch)
    group = sequences.group_index(offsets, batch)
    valid = ~entropy.isnan() if mask is None else mask & ~entropy.isnan()
    # Sorted by group, then valid before invalid, then value. Each sort is stable.
    order = torch.where(valid, entropy, torch.inf).argsort(stable=True)
    order = order[(~valid)[order].int().argsort(stable=True)]
    order = order[group[order].argsort(stable=True)]
    ordered = entropy[order]
    seen = torch.cat([valid.new_zeros(1, dtype=torch.int64), valid.cumsum(0)])
    count = seen[offsets[1:]] - seen[offsets[:-1]]  # (P,)

    def quantile(q: float) -> Tensor:
        if batch == 0:
            return entropy.new_full(count.shape, torch.nan)
        rank = q * (count - 1).clamp(min=0).to(entropy.dtype)
        below = rank.floor()
        first = offsets[:-1] + below.long()
        second = torch.minimum(first + 1, offsets[:-1] + (count - 1).clamp(min=0))
        low, high = (ordered[at.clamp(0, batch - 1)] for at in (first, second))
        return torch.where(count > 0, torch.lerp(low, high, rank - below), torch.nan)

    q1, q3 = quantile(0.25), quantile(0.75)
    lower = q1 - k * (q3 - q1)
    keep = valid & (entropy >= lower[group]) if batch else valid
    return keep, lower, q1, q3
