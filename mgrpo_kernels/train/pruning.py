"""Which trajectories the IQR filter leaves."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels import iqr_filter

SCOPES = ("both", "vote", "penalise")
"""What becomes of pruned rollouts: they neither vote nor train; they do not vote; they do not vote, and get reward 0."""
SCORERS = ("sampler", "policy")
"""Which model's entropy counts for the momentum rollouts."""


def survivors(entropy: Tensor, group: int, *, k: float, min_spread: float = 0.0) -> Tensor:
    """Return which trajectories survive :func:`mgrpo_kernels.iqr_filter` within their prompt's group, ``(B,)`` bool.

    With `min_spread` a group abstains, and keeps all of its own, where Q3 - Q1 < min_spread x median: where the spread is tiny against
    the level the quartiles describe rounding and chance, and the filter prunes more the less there is to see. This is not in the paper.

    Args:
        entropy: ``(B,)``, one a trajectory, groups of `group` together; NaN for an empty one, which never survives.
        group: G.
        k: of the filter.
        min_spread: >= 0; 0 never abstains, which is the paper's filter.
    """
    found = iqr_filter(entropy, group, k=k)
    median = entropy.view(-1, group).nanquantile(0.5, dim=1)  # (P,)
    abstains = found.q3 - found.q1 < min_spread * median
    return found.keep | (abstains.repeat_interleave(group) & ~torch.isnan(entropy))
