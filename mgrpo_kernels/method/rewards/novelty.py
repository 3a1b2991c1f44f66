"""EVOL-RL: the majority selects, novelty ranks."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mgrpo_kernels.method.signals import Signals

KINDS_AT_ONCE = 1 << 14
"""Kinds of tokens and pairs whose counts are held for all responses of a prompt at once: 8 MiB for 64 responses."""


def evol(signals: Signals) -> Tensor:
    """Return EVOL-RL's rewards: 1/2 to 1 with the label, -1 to -1/2 with another answer, the more the newer; -1 without an answer."""
    assert signals.tokens is not None
    assert signals.mask is not None
    rewards = torch.zeros(len(signals.tokens), dtype=torch.float32)
    bounds = itertools.pairwise(signals.offsets.tolist())
    for (start, end), label in zip(bounds, signals.vote.labels, strict=True):
        if label is None:  # nothing to select by
            continue
        rewards[start:end] = -1.0
        rows = [row for row in range(start, end) if signals.vote.cluster[row] >= 0]
        agrees = signals.vote.agrees[rows] > 0
        novelty = _novelty(similarity([signals.tokens[row][signals.mask[row]] for row in rows]), agrees)
        for flags, lowest in ((agrees, 0.5), (~agrees, -1.0)):
            if flags.any():
                rewards[torch.tensor(rows)[flags]] = lowest + 0.5 * _ranked(novelty[flags])
    return rewards


def similarity(responses: list[Tensor]) -> Tensor:
    """Return the cosine similarity of R responses' counts of tokens and of pairs of neighbouring tokens, ``(R, R)`` in [0, 1]."""
    R = len(responses)
    # A pair is one number, of which the upper half is the first token + 1.
    grams = [torch.cat([each, ((each[:-1] + 1) << 32) + each[1:]]) for each in responses]
    owner = torch.arange(R).repeat_interleave(torch.tensor([len(each) for each in grams], dtype=torch.int64))
    kinds, column = torch.unique(torch.cat(grams), return_inverse=True)
    cells, counts = torch.unique(column * R + owner, return_counts=True)
    product = torch.zeros(R, R, dtype=torch.float64)  # of counts: whole numbers, and so exact in every order
    for first in range(0, len(kinds), KINDS_AT_ONCE):
        start, end = torch.searchsorted(cells, torch.tensor([first, first + KINDS_AT_ONCE]) * R).tolist()
        block = torch.zeros(min(KINDS_AT_ONCE, len(kinds) - first), R, dtype=torch.float64)
        block.view(-1)[cells[start:end] - first * R] = counts[start:end].double()
        product += block.T @ block
    norm = product.diagonal().sqrt().clamp(min=1.0)  # 0 for an empty response alone
    cosine: Tensor = product / norm[:, None] / norm
    return cosine.clamp(0.0, 1.0).float()


def _novelty(similar: Tensor, agrees: Tensor) -> Tensor:
    """Return 1 - (mean similarity to the others of the same kind + highest similarity to any other) / 2, ``(R,)``.

    A rollout that is the only one of its kind is compared with all others, and a rollout without others has similarity 1/2 to them.
    """
    R = len(similar)
    if R < 2:
        return torch.full((R,), 0.5, dtype=torch.float32)
    others = ~torch.eye(R, dtype=torch.bool)
    same = (agrees[:, None] == agrees) & others
    same = torch.where(same.any(-1, keepdim=True), same, others)
    mean = torch.where(same, similar, 0.0).sum(-1) / same.sum(-1)
    highest = torch.where(others, similar, -1.0).amax(-1)
    return 1.0 - 0.5 * (mean + highest)


def _ranked(novelty: Tensor) -> Tensor:
    """Return novelty scaled to [0, 1]: 1/2 if all are equal, 1 for a single one."""
    if len(novelty) == 1:
        return torch.ones(1, dtype=torch.float32)
    lowest, highest = novelty.min(), novelty.max()
    return (novelty - lowest) / (highest - lowest) if highest > lowest else torch.full_like(novelty, 0.5)
