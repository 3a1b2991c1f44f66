"""The IQR filter as the method applies it: rollouts of unusually low entropy within their group are pruned."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels import sequences
from mgrpo_kernels.ops.iqr_filter import iqr_filter


def survivors(entropy: Tensor, groups: int | Tensor, *, k: float, min_spread: float = 0.0) -> Tensor:
    """Return which rollouts survive :func:`mgrpo_kernels.iqr_filter` within their prompt's group, ``(B,)`` bool.

    With `min_spread` > 0, a group with Q3 - Q1 < min_spread x median is not filtered. If the spread of the entropies is tiny compared with
    their level, the quartiles reflect rounding and chance. The paper has no such threshold.

    Args:
        entropy: ``(B,)``, one value per rollout; NaN for an empty rollout, which never survives.
        groups: group size G, or int offsets ``(P+1,)`` of contiguous groups, which may be empty.
        k: factor of the filter.
        min_spread: smallest relative spread at which the filter prunes, >= 0; 0 always filters, as the paper does.
    """
    found = iqr_filter(entropy, groups, k=k)
    if min_spread == 0:
        return found.keep
    offsets = sequences.group_offsets(groups, len(entropy), entropy.device)
    medians = [
        each.nanquantile(0.5) if len(each) else entropy.new_tensor(torch.nan) for each in _split(entropy, offsets)
    ]
    unfiltered = found.q3 - found.q1 < min_spread * torch.stack(medians)  # (P,); False if there is no median
    return found.keep | (unfiltered[sequences.group_index(offsets, len(entropy))] & ~entropy.isnan())


def _split(values: Tensor, offsets: Tensor) -> list[Tensor]:
    return list(values.split(offsets.diff().tolist()))
