"""Methods that penalise: RESTRAIN, SCRL and ResZero."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels import sequences
from mgrpo_kernels.method.rewards.answers import answers_of, group_mean
from mgrpo_kernels.method.signals import Outcome, Signals
from mgrpo_kernels.ops.policy_loss import group_advantages

RESTRAIN_WIDTH = 0.5
"""Standard deviation of the Gaussian of an answer's share, centred at 1, by which RESTRAIN weights the answer."""
RESTRAIN_PENALTY = 1.0
"""What RESTRAIN subtracts from the advantages of a group without a label."""

SCRL_SHARE = 0.375
"""Smallest share of the rollouts at which SCRL takes the most frequent answer as the label."""
SCRL_MARGIN = 0.125
"""SCRL takes no label unless the most frequent answer is ahead of the second by more than this share."""
SCRL_RARE = 0.125
"""SCRL penalises an answer whose share of the rollouts is below this, if its entropy is not below the group's mean."""
SCRL_ENTROPY = 0.1
"""Factor of the entropy in SCRL's rewards."""

RESZERO_PENALTY = 0.01
"""Factor of ResZero's penalty of the most frequent answer."""


def restrain(signals: Signals) -> Outcome:
    """Return RESTRAIN's advantages: those of every answer as the label, weighted by its share; negative ones in a group without a label."""
    answers = answers_of(signals)
    shaped = torch.exp(-0.5 * ((answers.shares - 1.0) / RESTRAIN_WIDTH).square())
    shaped = torch.where(answers.votes > 0, shaped, 0.0)
    weights = shaped / shaped.sum(-1, keepdim=True).clamp(min=1e-12)  # (P, C)
    labelled = _labelled(signals)
    advantages = torch.zeros(len(labelled), dtype=torch.float32)
    for column in range(weights.shape[1]):
        equals = (answers.answered & (answers.own == column)).float()
        of_label = group_advantages(equals, signals.offsets, mask=signals.trains, scale=signals.scale)
        advantages += weights[answers.group, column] * of_label
    rewards = torch.where(labelled, answers.of_rollout(weights), 0.0)
    return Outcome(rewards, torch.where(labelled, advantages, -RESTRAIN_PENALTY))


def scrl(signals: Signals) -> Tensor:
    """Return SCRL's rewards: positive for a label of strict consensus, negative for rare answers of high entropy."""
    assert signals.entropy is not None
    answers, mean = answers_of(signals), group_mean(signals.entropy, signals)
    assert answers.entropy is not None
    voters = signals.nonempty if signals.voters is None else signals.voters
    total = torch.zeros(len(answers.votes), dtype=torch.float32).index_add(0, answers.group, voters.float())
    shares = answers.votes / total.clamp(min=1.0)[:, None]  # of all voters, those without an answer included
    top = torch.cat([shares, torch.zeros(len(shares), 2, dtype=torch.float32)], dim=-1).topk(2, dim=-1).values
    strict = (top[:, 0] >= SCRL_SHARE) & (top[:, 0] - top[:, 1] > SCRL_MARGIN)
    share, surprise = answers.of_rollout(shares), answers.of_rollout(answers.entropy) - mean
    positive = strict[answers.group] & (signals.vote.agrees > 0)
    negative = ~positive & (share < SCRL_RARE) & (surprise >= 0)
    rewards = torch.where(positive, share, torch.where(negative, share - SCRL_RARE, 0.0)) - SCRL_ENTROPY * surprise
    return torch.where(answers.answered, rewards, -1.0)


def reszero(signals: Signals) -> Tensor:
    """Return the rewards of ResZero: zero in sum, positive for the more frequent of the answers other than the most frequent one."""
    answers = answers_of(signals)
    voters = signals.nonempty if signals.voters is None else signals.voters
    top = signals.vote.agrees > 0
    rest = voters & ~top

    def count(flags: Tensor) -> Tensor:
        return torch.zeros(len(signals.offsets) - 1, dtype=torch.float32).index_add(0, answers.group, flags.float())[
            answers.group
        ]

    share_of_top = count(voters & top) / count(voters).clamp(min=1.0)
    others = count(rest) - rest.float()  # of the rest without the rollout itself
    equal = answers.of_rollout(answers.votes) - rest.float()
    support = torch.where(top | ~answers.answered | (others == 0), 0.0, equal / others.clamp(min=1.0))
    total = torch.zeros(len(signals.offsets) - 1, dtype=torch.float32).index_add(
        0, answers.group, torch.where(rest, support, 0.0)
    )
    mean = total[answers.group] / count(rest).clamp(min=1.0)
    penalised = torch.where(top, -RESZERO_PENALTY, support - mean)
    return penalised * share_of_top + RESZERO_PENALTY * share_of_top.square()  # all 0 without a label


def _labelled(signals: Signals) -> Tensor:
    """Return whether each rollout's group has a label, ``(B,)`` bool."""
    labelled = torch.tensor([label is not None for label in signals.vote.labels], dtype=torch.bool)
    return labelled[sequences.group_index(signals.offsets, len(signals.vote.cluster))]
