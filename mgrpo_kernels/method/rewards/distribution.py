"""DARE: rewards from the whole distribution of the answers."""

from __future__ import annotations

import torch

from mgrpo_kernels.method.rewards.answers import answers_of
from mgrpo_kernels.method.signals import Outcome, Signals

DARE_BONUS = 0.1
"""Factor of the exploration bonus."""
DARE_LEAST = 0.05
"""Answers of a smaller probability are pruned."""
DARE_EPSILON = 1e-6
"""Added to an answer's entropy before its votes are divided by it."""


def dare(signals: Signals) -> Outcome:
    """Return DARE's rewards: the answer's probability, from votes divided by entropy, and a bonus for rare answers of low entropy.

    Rollouts whose answer is pruned do not train. If every answer of a group is below the threshold, none is pruned.
    """
    answers = answers_of(signals)
    assert answers.entropy is not None
    scores = (answers.votes / (answers.entropy + DARE_EPSILON)).nan_to_num(nan=0.0)
    probability = scores / scores.sum(-1, keepdim=True).clamp(min=1e-12)
    kept = probability >= DARE_LEAST
    kept |= ~kept.any(-1, keepdim=True) & (answers.votes > 0)
    scores = torch.where(kept, scores, 0.0)
    probability = scores / scores.sum(-1, keepdim=True).clamp(min=1e-12)
    votes = torch.where(kept, answers.votes, 0.0)
    rarity = 1.0 - votes / votes.sum(-1, keepdim=True).clamp(min=1.0)
    rewards = torch.where(kept, probability + DARE_BONUS * rarity * (1.0 - answers.entropy), 0.0)
    trains = answers.of_rollout(kept.float(), otherwise=1.0) > 0
    return Outcome(answers.of_rollout(rewards), trains=trains)
