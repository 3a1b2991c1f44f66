"""Which rollouts the IQR filter leaves."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels import sequences
from mgrpo_kernels.ops.iqr_filter import iqr_filter


def survivors(entropy: Tensor, groups: int | Tensor, *, k: float, min_spread: float = 0.0) -> Tensor:
    """Return which rollouts survive :func:`mgrpo_kernels.iqr_filter` within their prompt's group, ``(B,)`` bool.

    With `min_spread` a group abstains, and keeps all of its own, where Q3 - Q1 < min_spread x median: where the spread is tiny against
    the level the quartiles describe rounding and chance, and the filter prunes more the less there is to see. This is not in the paper.

    Args:
        entropy: ``(B,)``, one for each rollout; NaN for an empty one, which never survives.
        groups: group size G, or int offsets ``(P+1,)`` of contiguous groups, empty ones allowed.
        k: of the filter.
        min_spread: >= 0; 0 never abstains, which is the paper's filter.
    """
    found = iqr_filter(entropy, groups, k=k)
    if min_spread == 0:
        return found.keep
    offsets = sequences.group_offsets(groups, len(entropy), entropy.device)
    medians = [
        each.nanquantile(0.5) if len(each) else entropy.new_tensor(torch.nan) for each in _split(entropy, offsets)
    ]
    abstains = found.q3 - found.q1 < min_spread * torch.stack(medians)  # (P,); False where there is no median
    return found.keep | (abstains[sequences.group_index(offsets, len(entropy))] & ~entropy.isnan())


def _split(values: Tensor, offsets: Tensor) -> list[Tensor]:
    return list(values.split(offsets.diff().tolist()))
