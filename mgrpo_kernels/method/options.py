"""The options of the method: one frozen dataclass, which the trainer, TRL's MGRPOConfig and verl's configuration embed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mgrpo_kernels import checks
from mgrpo_kernels.method.methods import METHODS, Method
from mgrpo_kernels.ops.iqr_filter import REDUCTIONS
from mgrpo_kernels.vote import EQUIVALENCES

SCOPES = ("both", "vote", "penalise")
"""What becomes of pruned rollouts: they neither vote nor train; they do not vote; they do not vote, and get reward 0."""
SCORERS = ("sampler", "policy")
"""Which model's entropy counts for the momentum model's rollouts."""

MOMENTUM_OPTIONS = ("momentum_rollouts", "decay", "decay_end", "momentum_scored_by", "train_momentum_rollouts")
"""Options that a trainer without a momentum model cannot have."""


def option(default: Any, text: str, *, unit: str = "", choices: Iterable[str] | None = None, **bounds: float) -> Any:
    """Return a dataclass field with its help text, unit, choices, and bounds as :func:`mgrpo_kernels.checks.check_number` takes them."""
    return field(default=default, metadata={"help": text, "unit": unit, "choices": choices, "bounds": bounds})


@dataclass(frozen=True)
class MethodOptions:
    """What a method leaves to choose."""

    method: str = option("mgrpo", "where a rollout's reward comes from", choices=METHODS)
    momentum_rollouts: int | None = option(
        None,
        "number of each prompt's rollouts that the momentum model samples; none: the method's share, rounded down "
        "(half for mgrpo and co_rewarding, 0 for the others), but at least 1, and 2 stay with the policy",
        unit="rollouts",
        at_least=0,
    )
    decay: float = option(
        0.99,
        "decay m of the momentum model, which moves to m x itself + (1 - m) x policy after each step",
        at_least=0.0,
        below=1.0,
    )
    decay_end: float | None = option(
        None,
        "decay at the last step, reached along a cosine; none: constant, except for co_rewarding, which ends at 0.9999",
        at_least=0.0,
        below=1.0,
    )
    iqr_filter: bool | None = option(
        None, "prune rollouts of unusually low entropy; none: the method's default (on for mgrpo, else off)"
    )
    iqr_k: float = option(
        0.75, "prune a rollout if its entropy < Q1 - k (Q3 - Q1) of its prompt's rollouts", at_least=0.0
    )
    iqr_min_spread: float = option(
        0.0,
        "prune nothing in a prompt's rollouts where Q3 - Q1 < this x their median entropy; 0: always prune, as the paper",
        at_least=0.0,
    )
    filter_scope: str = option(
        "both",
        "what becomes of a pruned rollout: it neither votes nor trains (both), does not vote (vote), or does not vote and gets "
        "reward 0 (penalise)",
        choices=SCOPES,
    )
    entropy_reduction: str = option(
        "mean", "how the filter reduces the entropy of a rollout's tokens to one number", choices=REDUCTIONS
    )
    momentum_scored_by: str = option(
        "sampler",
        "which model's entropy counts for the momentum model's rollouts: the one that sampled them, or the policy",
        choices=SCORERS,
    )
    train_momentum_rollouts: bool = option(
        False,
        "train on the momentum model's rollouts too, each token weighted by policy / momentum model, at most behaviour_cap",
    )
    min_share: float = option(
        0.0, "a prompt gets no label where the majority's share of its answers is below this", at_least=0.0, at_most=1.0
    )
    equivalence: str = option("math", "which answers are equal: as mathematics, or the same text", choices=EQUIVALENCES)

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value, choices, bounds = getattr(self, each.name), each.metadata["choices"], each.metadata.get("bounds")
            if value is not None and choices is not None:
                checks.check_choice(each.name, value, tuple(choices))
            if value is not None and bounds:
                checks.check_number(each.name, value, **bounds)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], section: str) -> MethodOptions:
        """Return the options of a configuration's section.

        Raises:
            ValueError: no such option, or a value out of range.
        """
        for name in values:
            checks.check_choice(section, name, [each.name for each in dataclasses.fields(cls)])
        return cls(**values)

    @property
    def row(self) -> Method:
        """The method's row of the table."""
        return METHODS[self.method]

    @property
    def filters(self) -> bool:
        """Whether rollouts are pruned."""
        return self.row.filters if self.iqr_filter is None else self.iqr_filter

    def momentum_count(self, rollouts: int) -> int:
        """Return how many of a prompt's `rollouts` the momentum model samples: N of G.

        The method's share of G is rounded down, to at least 1 and at most G - 2, so that of an odd G the policy has the one more.

        Raises:
            ValueError: fewer than two rollouts are left to the policy, or none to a momentum model that gives the labels.
        """
        given, share = self.momentum_rollouts, self.row.momentum_share
        if given is None and share and rollouts < 3:
            raise ValueError(
                f"rollouts: expected at least 3 with method {self.method}, 1 of the momentum model and 2 of the policy, since an advantage "
                f"takes two, got {rollouts}"
            )
        number = given if given is not None else min(max(1, int(share * rollouts)), rollouts - 2) if share else 0
        if number > rollouts - 2:
            raise ValueError(
                f"momentum_rollouts: expected at most {rollouts - 2} of {rollouts} rollouts, since an advantage takes two of the policy's, "
                f"got {number}"
            )
        if self.row.voters == "momentum" and number < 1:
            raise ValueError(
                f"momentum_rollouts: expected >= 1 with method {self.method}, whose labels they give, got 0"
            )
        return number

    def trained_count(self, policy_rollouts: int) -> int:
        """Return how many of a prompt's rollouts from the policy train: the first so many; the others only vote."""
        return min(policy_rollouts, max(2, round(self.row.train_share * policy_rollouts)))

    @property
    def last_decay(self) -> float:
        """The momentum model's decay at the last step."""
        return next(each for each in (self.decay_end, self.row.decay_end, self.decay) if each is not None)

    def decay_at(self, step: int, steps: int) -> float:
        """Return the momentum model's decay at step `step` (from 1) of `steps`: from the first to the last along a cosine."""
        start, end = self.decay, self.last_decay
        progress = (step - 1) / max(1, steps - 1)
        return start if start == end else end - (end - start) * 0.5 * (1.0 + math.cos(math.pi * progress))

    def check_use(self, momentum: bool) -> None:
        """Raise ValueError for an option that was set and can have no effect; `momentum`: whether there is a momentum model.

        Raises:
            ValueError: says which option, and what it wants.
        """
        reads, rollouts = (
            self.row.reads,
            self.momentum_rollouts != 0 and (self.momentum_rollouts or self.row.momentum_share),
        )
        for name, is_set, needs, met in (
            ("train_momentum_rollouts", self.train_momentum_rollouts, "momentum rollouts", rollouts),
            ("momentum_scored_by", self.momentum_scored_by == "policy", "momentum rollouts", rollouts),
            ("decay_end", self.decay_end is not None, "a momentum model", momentum),
            ("filter_scope", self.filter_scope != "both", "the IQR filter (iqr_filter)", self.filters),
            ("filter_scope", self.filter_scope == "vote", "a method that votes", reads != "nothing"),
            ("min_share", self.min_share > 0, "a method whose reward is a label", reads == "label"),
            ("entropy_reduction", self.entropy_reduction == "sum", "the IQR filter (iqr_filter)", self.filters),
            ("iqr_min_spread", self.iqr_min_spread > 0, "the IQR filter (iqr_filter)", self.filters),
        ):
            if is_set and not met:
                got = getattr(self, name)
                raise ValueError(f"{name}: expected {needs} with it, without which it has no effect, got {got!r}")
        if self.row.highest <= 0 and self.filters and self.filter_scope == "penalise":
            raise ValueError(
                f"filter_scope: expected both or vote with method {self.method}, whose rewards are never above the 0 that a pruned rollout "
                "would get, got 'penalise'"
            )
