"""SPINE: only the tokens of the highest entropy train, and their entropy is kept in a band."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels.method.signals import Outcome, Signals

SPINE_SHARE = 0.2
"""Share of a response's tokens that train: those of the highest entropy."""
SPINE_BAND = (0.1, 0.5)
"""Quantiles of the entropies of these tokens between which an entropy is left alone."""
SPINE_COEFFICIENT = 0.1
"""Factor of the band's penalty."""


def spine(signals: Signals) -> Outcome:
    """Return the vote's rewards, weights of 1 at the forking tokens and 0 elsewhere, and a bonus that keeps their entropy in a band.

    The penalty of the band is linear in the entropy outside it. Its gradient at a token is estimated from the token itself: that of the
    entropy H is the mean of -(log p + H) grad log p over the tokens that the policy samples.
    """
    assert signals.token_entropy is not None
    assert signals.logprob is not None
    assert signals.mask is not None
    entropy = torch.where(signals.mask, signals.token_entropy.float(), torch.nan)
    forks = forking(entropy, signals.mask.sum(-1))
    outside = torch.zeros_like(entropy)  # the sign of the penalty's slope
    for row in forks.any(-1).nonzero().flatten().tolist():
        at_forks = entropy[row][forks[row]]
        low, high = at_forks.quantile(torch.tensor(SPINE_BAND, dtype=torch.float32)).unbind()
        outside[row][forks[row]] = (at_forks > high).float() - (at_forks < low).float()
    surprise = torch.where(forks, signals.logprob.float() + entropy, 0.0)
    return Outcome(signals.vote.agrees, token_weights=forks.float(), token_bonus=SPINE_COEFFICIENT * outside * surprise)


def forking(entropy: Tensor, lengths: Tensor) -> Tensor:
    """Return the tokens of the highest entropy of each response, ``(B, L)`` bool: a fifth of its length, rounded up.

    Args:
        entropy: ``(B, L)``; a token whose entropy is NaN is none of them. Of two as high, the earlier one comes first.
        lengths: ``(B,)``.
    """
    known = ~entropy.isnan()
    order = torch.where(known, entropy, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(entropy.shape[1]).expand_as(order))
    return known & (rank < (lengths * SPINE_SHARE).ceil()[:, None])
