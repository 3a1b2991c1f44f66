"""M-GRPO's filter, vote and advantages on a batch whose groups are told by a name each: other trainers' layout."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import checks
from mgrpo_kernels.ops.iqr_filter import REDUCTIONS, iqr_filter, trajectory_entropy
from mgrpo_kernels.ops.policy_loss import group_advantages
from mgrpo_kernels.train.pruning import SCOPES
from mgrpo_kernels.vote import EQUIVALENCES, majority_vote


@dataclass(frozen=True)
class Options:
    """What M-GRPO leaves to choose where the trainer is another's."""

    iqr_k: float = 0.75
    filter_scope: str = "both"
    """both: pruned rollouts neither vote nor train; vote: they do not vote; penalise: they do not vote, and get reward 0."""
    entropy_reduction: str = "mean"
    """A trajectory's entropy: mean over its tokens, or sum."""
    equivalence: str = "math"
    min_share: float = 0.0
    """No label where the majority's share of the answers is below this."""

    def __post_init__(self) -> None:
        checks.check_number("iqr_k", self.iqr_k, at_least=0.0)
        checks.check_choice("filter_scope", self.filter_scope, SCOPES)
        checks.check_choice("entropy_reduction", self.entropy_reduction, REDUCTIONS)
        checks.check_choice("equivalence", self.equivalence, EQUIVALENCES)
        checks.check_number("min_share", self.min_share, at_least=0.0, at_most=1.0)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Options:
        """Return the options of a configuration's section.

        Raises:
            ValueError: no such option, or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            checks.check_choice("mgrpo", name, known)
        return cls(**values)


class Selection(NamedTuple):
    """What becomes of B rollouts; tensors are on the CPU."""

    labels: dict[Hashable, str | None]  # by group
    rewards: Tensor  # (B,) float32, 0 or 1
    keeps: Tensor  # (B,) bool: what the filter leaves
    trains: Tensor  # (B,) bool: what the loss may see
    advantages: Tensor  # (B,) float32, 0 where it does not
    metrics: dict[str, float]


def select(
    entropy: Tensor, mask: Tensor, answers: Sequence[str | None], groups: Sequence[Hashable], options: Options
) -> Selection:
    """Filter, vote, reward and take advantages, in this order, within each group.

    Args:
        entropy: ``(B, L)`` per token, nats.
        mask: ``(B, L)`` bool, the response's tokens. A row without any (padding, an empty response) neither votes nor trains.
        answers: B, None for none.
        groups: B names, in any order: rollouts of one prompt have the same.
        options: see there.
    """
    entropy, mask = entropy.cpu(), mask.cpu()
    number: dict[Hashable, int] = {}
    place = torch.tensor([number.setdefault(name, len(number)) for name in groups])  # (B,) which group
    order = place.argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    offsets = torch.zeros(len(number) + 1, dtype=torch.int64)
    offsets[1:] = place.bincount(minlength=len(number)).cumsum(0)

    level = trajectory_entropy(entropy[order], mask=mask[order], reduction=options.entropy_reduction)  # (B,)
    filled = ~level.isnan()
    keeps = iqr_filter(level, offsets, k=options.iqr_k).keep
    vote = majority_vote(
        [answers[i] for i in order.tolist()],
        offsets,
        voters=keeps,
        equivalence=options.equivalence,
        min_share=options.min_share,
    )
    rewards = vote.agrees if options.filter_scope != "penalise" else torch.where(keeps, vote.agrees, 0.0)
    trains = keeps if options.filter_scope == "both" else filled
    advantages = group_advantages(rewards, offsets, mask=trains)

    real = [i for i in range(len(number)) if filled[offsets[i] : offsets[i + 1]].any()]  # groups that are no padding
    metrics = {
        "mgrpo/pruned_fraction": 1.0 - float(keeps.sum()) / max(1, int(filled.sum())),
        "mgrpo/vote_share": float(vote.share[real].mean()) if real else 0.0,
        "mgrpo/labelled_fraction": sum(vote.labels[i] is not None for i in real) / max(1, len(real)),
        "mgrpo/reward": float(rewards[trains].mean()) if trains.any() else 0.0,
    }
    return Selection(
        dict(zip(number, vote.labels, strict=True)),
        rewards[back],
        keeps[back],
        trains[back],
        advantages[back],
        metrics,
    )
