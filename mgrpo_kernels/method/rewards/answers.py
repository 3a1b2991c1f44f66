"""The answers of each group in a table, for methods that use the whole distribution of the answers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import sequences
from mgrpo_kernels.method.signals import Signals


class Answers(NamedTuple):
    """P groups, of at most C different answers each."""

    group: Tensor  # (B,) int64: the group of each rollout
    own: Tensor  # (B,) int64: the column of each rollout's answer, 0 for one without an answer
    answered: Tensor  # (B,) bool
    votes: Tensor  # (P, C) float32: number of voters with the answer
    entropy: Tensor | None  # (P, C) float32: mean entropy of the rollouts with the answer; NaN if none has one

    def of_rollout(self, table: Tensor, otherwise: float = 0.0) -> Tensor:
        """Return the entry of each rollout's answer in a table ``(P, C)``, ``(B,)``; `otherwise` for a rollout without one."""
        return torch.where(self.answered, table[self.group, self.own], otherwise)

    @property
    def shares(self) -> Tensor:
        """Share of the answer among the voters' answers, ``(P, C)``; 0 if there are none."""
        return self.votes / self.votes.sum(-1, keepdim=True).clamp(min=1.0)


def answers_of(signals: Signals) -> Answers:
    """Count the votes for each answer, and take the mean of the entropies of the rollouts that give it."""
    cluster, groups = signals.vote.cluster, len(signals.offsets) - 1
    group = sequences.group_index(signals.offsets, len(cluster))
    answered, columns = cluster >= 0, 1 + int(cluster.max()) if len(cluster) else 1
    columns = max(columns, 1)
    own = cluster.clamp(min=0)

    def table(values: Tensor) -> Tensor:
        cells = torch.zeros(groups * columns, dtype=torch.float32).index_add(
            0, group * columns + own, torch.where(answered, values, 0.0)
        )
        return cells.reshape(groups, columns)

    voters = signals.nonempty if signals.voters is None else signals.voters
    entropy = None
    if signals.entropy is not None:
        known = ~signals.entropy.isnan()
        entropy = table(signals.entropy.nan_to_num(nan=0.0)) / table(known.float())  # 0 / 0 is NaN
    return Answers(group, own, answered, table(voters.float()), entropy)


def group_mean(values: Tensor, signals: Signals) -> Tensor:
    """Return the mean of the values that are not NaN in each rollout's group, ``(B,)``; NaN if there are none."""
    group = sequences.group_index(signals.offsets, len(values))
    zeros = torch.zeros(len(signals.offsets) - 1, dtype=torch.float32)
    total = zeros.index_add(0, group, values.nan_to_num(nan=0.0))
    return (total / zeros.index_add(0, group, (~values.isnan()).float()))[group]
