"""The filter of the method: the paper's, and its abstention."""

from __future__ import annotations

import torch

from mgrpo_kernels import iqr_filter
from mgrpo_kernels.method import survivors

NAN = float("nan")
WIDE = [0.1, 1.0, 1.1, 1.2, 1.3, 1.4]  # the first is pruned: Q1 1.025, Q3 1.275, lower 0.8375
TINY = [1.00, 1.0100, 1.0101, 1.0102, 1.0103, 1.0104]  # spread 0.0002, and yet the first is pruned


def test_without_min_spread_it_is_the_papers_filter() -> None:
    entropy = torch.randn(64, generator=torch.Generator().manual_seed(0)).exp()
    entropy[5] = NAN
    assert torch.equal(survivors(entropy, 8, k=0.1), iqr_filter(entropy, 8, k=0.1).keep)
    assert not survivors(entropy, 8, k=0.1).all()


def test_a_group_abstains_where_its_spread_is_small_against_its_level() -> None:
    entropy = torch.tensor([*WIDE, *TINY])
    first = [False, True, True, True, True, True]
    assert survivors(entropy, 6, k=0.75).tolist() == first * 2
    assert survivors(entropy, 6, k=0.75, min_spread=0.01).tolist() == [*first, *[True] * 6]
    assert survivors(entropy, 6, k=0.75, min_spread=0.5).all()  # 0.25 / 1.15 too
    assert survivors(entropy * 1e-3, 6, k=0.75, min_spread=0.01).tolist() == [*first, *[True] * 6]  # no unit in it


def test_an_empty_trajectory_never_survives() -> None:
    entropy = torch.tensor([*TINY[:5], NAN, *[NAN] * 6])
    assert survivors(entropy, 6, k=0.75, min_spread=0.01).tolist() == [*[True] * 5, False, *[False] * 6]
