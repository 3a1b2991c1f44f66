"""The interface of a method: the signals that it may read, and the outcome that it returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels.vote import Vote


class Signals(NamedTuple):
    """The inputs from which a method computes rewards: B rollouts in P groups, of at most L tokens, on the CPU."""

    vote: Vote
    offsets: Tensor  # (P+1,) int64: the start of each group, and the end of the last
    nonempty: Tensor  # (B,) bool: the response has at least one token
    entropy: Tensor | None  # (B,) mean over the tokens, nats; NaN for an empty response; None if it was not given
    self_certainty: Tensor | None  # (B,) mean over the tokens; None if it was not given
    correct: Tensor | None  # (B,) 1 if the answer equals the true one, else 0; None if the method does not need it
    generator: torch.Generator | None  # for methods that draw random numbers
    voters: Tensor | None = None  # (B,) bool: the rollouts that voted
    by_momentum: Tensor | None = None  # (B,) bool: the momentum model's rollouts
    trains: Tensor | None = None  # (B,) bool: the rollouts that train, unless the method excludes them
    scale: str = "std"  # of the advantages, as in group_advantages
    mask: Tensor | None = None  # (B, L) bool: the tokens of each response
    token_entropy: Tensor | None = None  # (B, L) nats; arbitrary where the mask is False; None if it was not given
    logprob: Tensor | None = None  # (B, L), likewise
    tokens: Tensor | None = None  # (B, L) int64, likewise


class Outcome(NamedTuple):
    """What a method returns if it decides more than the rewards."""

    rewards: Tensor  # (B,) float32, which may be negative; NaN: the rollout does not train
    advantages: Tensor | None = None  # (B,) float32, in place of the group advantages of the rewards
    token_weights: Tensor | None = None  # (B, L) float32 >= 0, factors of the advantage at each token
    token_bonus: Tensor | None = None  # (B, L) float32, added to the weighted advantage at each token
    trains: Tensor | None = None  # (B,) bool: False excludes a rollout from the loss
