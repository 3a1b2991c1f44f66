"""Types that the IQR filter shares with its backends, tests and benchmarks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class IqrFilter(NamedTuple):
    """Which trajectories stay, and the group figures that decided it."""

    keep: Tensor  # (B,) bool
    lower: Tensor  # (P,) q1 - k (q3 - q1)
    q1: Tensor  # (P,)
    q3: Tensor  # (P,)
