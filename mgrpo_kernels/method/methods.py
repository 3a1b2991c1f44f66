"""The table of methods. A method says where a rollout's reward comes from; adding one is adding one entry to :data:`METHODS`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import sequences
from mgrpo_kernels.vote import Vote

EMPO_MOST_ENTROPY = 0.9
"""EMPO gives reward 0 in a group whose answers' entropy, as a share of the largest possible one, is above this."""


class Signals(NamedTuple):
    """What a method may compute its rewards from: B rollouts in P groups, on the CPU."""

    vote: Vote
    offsets: Tensor  # (P+1,) int64: where each group begins and ends
    nonempty: Tensor  # (B,) bool: the response has a token
    entropy: Tensor | None  # (B,) mean over the tokens, nats; NaN for an empty response. For methods that need it
    self_certainty: Tensor | None  # (B,) mean over the tokens. For methods that need it
    correct: Tensor | None  # (B,) 1 where the answer equals the true one, else 0. For methods that need it
    generator: torch.Generator | None  # for methods that draw random numbers


class Method(NamedTuple):
    """One method: its reward, and the defaults and needs that come with it."""

    rewards: Callable[[Signals], Tensor]  # (B,) float32
    text: str  # the reward of a rollout, for --help and the tables in the documentation
    source: str = ""  # where the method is from, for the documentation (Markdown)
    momentum_share: float = 0.0  # default share of a prompt's rollouts that the momentum model samples
    filters: bool = False  # whether the IQR filter prunes by default
    reads: str = "label"  # what the reward reads of the vote: its "label", the "shares" of its clusters, or "nothing"
    highest: float = math.inf  # an upper bound of the reward
    voters: str = "survivors"  # who votes: all survivors of the filter, or of these only the "momentum" model's
    train_share: float = 1.0  # share of a prompt's policy rollouts that train; the others only vote
    decay_end: float | None = None  # default decay of the momentum model at the last step, reached along a cosine
    needs_gold: bool = False
    needs_entropy: bool = False
    needs_self_certainty: bool = False
    needs_generator: bool = False


def _agreement(signals: Signals) -> Tensor:
    return signals.vote.agrees


def _cluster_share(signals: Signals) -> Tensor:
    return signals.vote.cluster_share


def _certain_cluster_share(signals: Signals) -> Tensor:
    """EMPO: the share of the rollout's own answer, and 0 where the group spreads over too many answers."""
    share, answered = signals.vote.cluster_share, signals.vote.cluster >= 0
    # A cluster of n rollouts is summed n times, each time as -log(its share) / n: the entropy over clusters.
    surprise = torch.where(answered & (share > 0), -share.clamp_min(1e-30).log(), 0.0)
    answers = sequences.segment_reduce(answered.float(), signals.offsets)  # (P,)
    entropy = sequences.segment_reduce(surprise, signals.offsets) / answers.clamp_min(1)
    certain = entropy <= EMPO_MOST_ENTROPY * signals.offsets.diff().clamp_min(1).log()
    return torch.where(certain[sequences.group_index(signals.offsets, len(share))], share, 0.0)


def _self_certainty(signals: Signals) -> Tensor:
    assert signals.self_certainty is not None
    return torch.where(signals.nonempty, signals.self_certainty, 0.0)  # an empty response never trains


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


METHODS: dict[str, Method] = {
    "mgrpo": Method(
        _agreement,
        "1 if it agrees with the vote of policy and momentum model",
        _arxiv("2512.13070", "M-GRPO, "),
        momentum_share=0.5,
        filters=True,
    ),
    "srt": Method(_agreement, "1 if it agrees with the policy's own majority", _arxiv("2505.21444", "SRT, ")),
    "ttrl": Method(
        _agreement, "as srt, but only half of the rollouts train", _arxiv("2504.16084", "TTRL, "), train_share=0.5
    ),
    "soft_vote": Method(
        _cluster_share,
        "share of its own answer among the answers",
        "SRT with a soft reward",
        reads="shares",
    ),
    "empo": Method(
        _certain_cluster_share,
        "as soft_vote, but 0 where the group is too uncertain",
        _arxiv("2504.05812", "EMPO, "),
        reads="shares",
    ),
    "intuitor": Method(
        _self_certainty,
        "self-certainty: mean of logsumexp(z) - mean(z) over its tokens",
        _arxiv("2505.19590", "Intuitor, "),
        reads="nothing",
        needs_self_certainty=True,
    ),
    "rent": Method(
        _low_entropy,
        "minus its mean token entropy",
        _arxiv("2505.22660", "RENT, "),
        reads="nothing",
        highest=0.0,
        needs_entropy=True,
    ),
    "co_rewarding": Method(
        _agreement,
        "1 if it agrees with the momentum model's own majority",
        _arxiv("2508.00410", "Co-rewarding-II, "),
        momentum_share=0.5,
        voters="momentum",
        decay_end=0.9999,
    ),
    "gold": Method(
        _gold, "1 if it equals the true answer: the upper bound", "supervised", reads="nothing", needs_gold=True
    ),
    "random": Method(
        _coin_flips, "0 or 1 by a coin flip: the control", "control", reads="nothing", needs_generator=True
    ),
}
