"""The table of methods. A method defines how rollouts are rewarded. To add one, add an entry to :data:`METHODS` and its name above it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import sequences
from mgrpo_kernels.method.signals import Outcome, Signals

EMPO_MOST_ENTROPY = 0.9
"""EMPO sets the rewards of a group to 0 if the entropy of its answers, as a share of the largest possible one, is above this."""


class Method(NamedTuple):
    """One method: its reward, its defaults and its requirements."""

    rewards: Callable[[Signals], Tensor | Outcome]  # returns (B,) float32, or more than the rewards
    text: str  # the reward of a rollout, for --help and the tables in the documentation
    source: str = ""  # publication of the method, in Markdown, for the documentation
    inferred: str = ""  # what differs from the publication or is inferred here, for the documentation
    momentum_share: float = 0.0  # default share of a prompt's rollouts that the momentum model generates
    filters: bool = False  # whether the IQR filter prunes by default
    reads: Literal["label", "shares", "nothing"] = "label"  # the part of the vote that the reward depends on
    highest: float = math.inf  # upper bound of the reward
    voters: Literal["survivors", "momentum"] = "survivors"  # of the filter: all, or only the momentum model's
    train_share: float = 1.0  # share of a prompt's policy rollouts that train; the others only vote
    decay_end: float | None = None  # default decay of the momentum model at the last step, reached along a cosine
    answer_weight: float = 1.0  # default weight of the final answer's tokens in the loss
    own_advantages: bool = False  # whether the method computes advantages from more than its rewards
    needs_gold: bool = False
    needs_entropy: bool = False
    needs_self_certainty: bool = False
    needs_logprob: bool = False
    needs_tokens: bool = False
    needs_generator: bool = False


def _agreement(signals: Signals) -> Tensor:
    return signals.vote.agrees


def _cluster_share(signals: Signals) -> Tensor:
    return signals.vote.cluster_share


def _certain_cluster_share(signals: Signals) -> Tensor:
    """Return EMPO's rewards: the share of the rollout's answer, or 0 if the group's answers are too uncertain."""
    share, answered = signals.vote.cluster_share, signals.vote.cluster >= 0
    # The mean of -log(share) over the rollouts is the entropy over the clusters.
    surprise = torch.where(answered & (share > 0), -share.clamp_min(1e-30).log(), 0.0)
    answers = sequences.segment_reduce(answered.float(), signals.offsets)  # (P,)
    entropy = sequences.segment_reduce(surprise, signals.offsets) / answers.clamp_min(1)
    certain = entropy <= EMPO_MOST_ENTROPY * signals.offsets.diff().clamp_min(1).log()
    return torch.where(certain[sequences.group_index(signals.offsets, len(share))], share, 0.0)


def _self_certainty(signals: Signals) -> Tensor:
    assert signals.self_certainty is not None
    return torch.where(signals.nonempty, signals.self_certainty, 0.0)  # an empty response does not train


def _low_entropy(signals: Signals) -> Tensor:
    assert signals.entropy is not None
    return torch.where(signals.nonempty, -signals.entropy, 0.0)


def _gold(signals: Signals) -> Tensor:
    assert signals.correct is not None
    return signals.correct


def _coin_flips(signals: Signals) -> Tensor:
    return torch.randint(0, 2, signals.nonempty.shape, generator=signals.generator).float()


def _arxiv(number: str, before: str = "") -> str:
    return f"{before}[{number}](https://arxiv.org/abs/{number})"


# A test compares these names with those of the table.
MethodName = Literal[
    "mgrpo", "srt", "ttrl", "soft_vote", "empo", "om_grpo", "intuitor", "rent", "co_rewarding", "gold", "random"
]
METHODS: dict[MethodName, Method] = {
    "mgrpo": Method(
        _agreement,
        "1 if the answer equals the vote of policy and momentum model",
        _arxiv("2512.13070", "M-GRPO, "),
        momentum_share=0.5,
        filters=True,
    ),
    "srt": Method(
        _agreement,
        "1 if the answer equals the vote of the policy's rollouts",
        _arxiv("2505.21444", "SRT, "),
    ),
    "ttrl": Method(
        _agreement,
        "like srt, but only half of the rollouts train",
        _arxiv("2504.16084", "TTRL, "),
        train_share=0.5,
    ),
    "soft_vote": Method(
        _cluster_share,
        "share of the prompt's answers that equal the rollout's answer",
        "SRT with a soft reward",
        reads="shares",
    ),
    "empo": Method(
        _certain_cluster_share,
        "like soft_vote, but 0 if the answers to the prompt vary too much",
        _arxiv("2504.05812", "EMPO, "),
        reads="shares",
    ),
    "om_grpo": Method(
        _cluster_share,
        "like soft_vote, but the tokens of the final answer get no gradient",
        _arxiv("2608.03119", "OM-GRPO, "),
        "the KL term acts on the answer, too; without the format reward and the contrast-augmented reward",
        reads="shares",
        answer_weight=0.0,
    ),
    "intuitor": Method(
        _self_certainty,
        "self-certainty: token mean of logsumexp(logits) - mean(logits)",
        _arxiv("2505.19590", "Intuitor, "),
        reads="nothing",
        needs_self_certainty=True,
    ),
    "rent": Method(
        _low_entropy,
        "negative mean token entropy",
        _arxiv("2505.22660", "RENT, "),
        reads="nothing",
        highest=0.0,
        needs_entropy=True,
    ),
    "co_rewarding": Method(
        _agreement,
        "1 if the answer equals the vote of the momentum model's rollouts",
        _arxiv("2508.00410", "Co-rewarding-II, "),
        momentum_share=0.5,
        voters="momentum",
        decay_end=0.9999,
    ),
    "gold": Method(
        _gold,
        "1 if the answer equals the true answer (supervised upper bound)",
        "supervised",
        reads="nothing",
        needs_gold=True,
    ),
    "random": Method(
        _coin_flips,
        "0 or 1 with equal probability (control)",
        "control",
        reads="nothing",
        needs_generator=True,
    ),
}
