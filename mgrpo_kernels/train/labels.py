"""The methods: where a rollout's reward comes from. A row of the table is a method; adding one touches nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import Vote

EMPO_MOST_ENTROPY = 0.9
"""EMPO rewards nothing in a group whose answers' entropy, as a share of the largest possible one, is above this."""


class Signals(NamedTuple):
    """What a method may look at: the B = P x G rollouts of a step, those of one prompt together, on the CPU."""

    vote: Vote
    group: int  # G
    entropy: Tensor  # (B,) mean over tokens, nats; NaN for an empty response
    self_certainty: Tensor | None  # (B,) mean over tokens, for the methods that ask for it
    correct: Tensor  # (B,) 1 where the answer equals the true one, else 0; NaN where that is not known
    generator: torch.Generator  # of this step


class Method(NamedTuple):
    """One method."""

    rewards: Callable[[Signals], Tensor]  # (B,) float32
    text: str
    momentum_share: float = 0.0  # of a prompt's rollouts, by default
    filters: bool = False  # whether the IQR filter prunes, by default
    reads: str = "label"  # of the vote; or "shares" of its clusters, or "nothing"
    highest: float = math.inf  # no reward is above this
    voters: str = "survivors"  # or "momentum": of these only the momentum model's
    train_share: float = 1.0  # of a prompt's policy rollouts; the others only vote
    decay_end: float | None = None  # of the momentum model, along a cosine
    needs_gold: bool = False
    needs_self_certainty: bool = False


def _agreement(signals: Signals) -> Tensor:
    return signals.vote.agrees


def _cluster_share(signals: Signals) -> Tensor:
    return signals.vote.cluster_share


def _certain_cluster_share(signals: Signals) -> Tensor:
    """EMPO: the share of the rollout's own answer, and nothing where the group spreads over too many answers."""
    share = signals.vote.cluster_share.view(-1, signals.group)  # (P, G)
    answered = signals.vote.cluster.view(-1, signals.group) >= 0
    # A cluster of n rollouts is summed n times, each time as -log(its share) / n: the entropy over clusters.
    surprise = torch.where(answered & (share > 0), -share.clamp_min(1e-30).log(), 0.0)
    entropy = surprise.sum(-1) / answered.sum(-1).clamp_min(1)
    certain = entropy <= EMPO_MOST_ENTROPY * math.log(signals.group)
    return torch.where(certain.unsqueeze(-1), share, 0.0).reshape(-1)


def _self_certainty(signals: Signals) -> Tensor:
    assert signals.self_certainty is not None
    return torch.where(
        signals.entropy.isnan(), 0.0, signals.self_certainty
    )  # an empty response has none, and never trains


def _low_entropy(signals: Signals) -> Tensor:
    return torch.where(signals.entropy.isnan(), 0.0, -signals.entropy)


def _gold(signals: Signals) -> Tensor:
    return signals.correct


def _coin_flips(signals: Signals) -> Tensor:
    return torch.randint(0, 2, signals.entropy.shape, generator=signals.generator).float()


METHODS: dict[str, Method] = {
    "mgrpo": Method(_agreement, "majority of policy and momentum model, after the IQR filter", momentum_share=0.25, filters=True),
    "srt": Method(_agreement, "majority of the policy's own rollouts"),
    "ttrl": Method(_agreement, "all vote, half of them train", train_share=0.5),
    "soft_vote": Method(_cluster_share, "share of the rollout's own answer (SRT-soft)", reads="shares"),
    "empo": Method(_certain_cluster_share, "that share, but nothing where a group is too uncertain", reads="shares"),
    "intuitor": Method(
        _self_certainty, "self-certainty: mean of logsumexp(z) - mean(z)", reads="nothing", needs_self_certainty=True
    ),
    "rent": Method(_low_entropy, "minus the mean token entropy", reads="nothing", highest=0.0),
    "co_rewarding": Method(
        _agreement, "majority of the momentum model's rollouts alone (Co-rewarding-II)", momentum_share=0.5, voters="momentum",
        decay_end=0.9999,
    ),
    "gold": Method(_gold, "the true answer: the supervised upper bound", reads="nothing", needs_gold=True),
    "random": Method(_coin_flips, "coin flips: the control", reads="nothing"),
}  # fmt: skip
