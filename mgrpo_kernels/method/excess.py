"""Votes that count by excess: how much more frequent an answer is for its prompt than for the other prompts of the step.

An answer that a model tends to give whatever the prompt gets votes on every prompt, and it is the one onto which self-supervised training
collapses. Its excess is about 0. Where the answers to different prompts differ, the excess of an answer is its share of the votes, so that
the vote is the plain one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mgrpo_kernels.vote.equality import KEYS, Equivalence


def excess_weights(
    answers: Sequence[str | None], offsets: Tensor, voters: Tensor, equivalence: Equivalence = "exact"
) -> Tensor:
    """Return how much the vote of each rollout counts, ``(B,)`` float32 in [0, 1].

    The weights of an answer add up to its number of votes times (1 - share elsewhere / share here), which is its excess times the number of
    votes on the prompt; it is 0 where the answer is not more frequent here than elsewhere.

    Args:
        answers: B answers; None or an empty one has the weight 0.
        offsets: ``(P+1,)`` int, the bounds of the prompts' rollouts.
        voters: ``(B,)`` bool.
        equivalence: "math" or "exact", which answers are the same one. With a function, those are that are the same text.
    """
    key_of: Callable[[str], Hashable] = KEYS[equivalence] if isinstance(equivalence, str) else str.strip
    votes = [
        key_of(answer) if voter and answer is not None and answer.strip() else None
        for answer, voter in zip(answers, voters.tolist(), strict=True)
    ]
    groups = [
        Counter(vote for vote in votes[start:end] if vote is not None) for start, end in pairwise(offsets.tolist())
    ]
    every = sum(groups, Counter[Hashable]())
    weights: list[float] = []
    for (start, end), here in zip(pairwise(offsets.tolist()), groups, strict=True):
        elsewhere = max(1, every.total() - here.total())
        for vote in votes[start:end]:
            rest = (every[vote] - here[vote]) / elsewhere
            weights.append(max(0.0, 1.0 - rest * here.total() / here[vote]) if vote is not None else 0.0)
    return torch.tensor(weights, dtype=torch.float32)
