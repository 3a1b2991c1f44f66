"""Options of the method: one frozen dataclass that the trainer, TRL's MGRPOConfig and verl's configuration embed."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from mgrpo_kernels import checks
from mgrpo_kernels.method.fields import check_fields, option
from mgrpo_kernels.method.methods import METHODS, Method, MethodName
from mgrpo_kernels.teacher import Gate, Schedule, Teacher

Scope = Literal["both", "vote", "penalise"]
SCOPES: tuple[Scope, ...] = typing.get_args(Scope)
"""Effects of pruning on a rollout: it neither votes nor trains; it does not vote; it does not vote, and its reward is 0."""
DECAY, EVERY, AGREEMENT = 0.99, 10, 0.5  # defaults
Scorer = Literal["sampler", "policy"]
SCORERS: tuple[Scorer, ...] = typing.get_args(Scorer)
"""Models whose token entropies the filter may use for the momentum model's rollouts."""
Reduction = Literal["mean", "sum"]
VoteBy = Literal["count", "excess"]
EquivalenceName = Literal["math", "exact"]
# A test compares the last two with REDUCTIONS of mgrpo_kernels.ops.iqr_filter and EQUIVALENCES of mgrpo_kernels.vote.

MOMENTUM_OPTIONS = (
    "momentum_rollouts",
    "decay",
    "decay_end",
    "teacher",
    "teacher_every",
    "teacher_agreement",
    "teacher_votes",
    "momentum_scored_by",
    "train_momentum_rollouts",
)
"""Options that a trainer without a momentum model cannot have."""
MOMENTUM_GROUP = "momentum model"
"""Title of the group that lists them in --help."""


@dataclass(frozen=True)
class MethodOptions:
    """Options of the method, shared by the trainer and the integrations."""

    method: MethodName = option("mgrpo", "training method, which determines how rollouts are rewarded", table=METHODS)
    momentum_rollouts: int | None = option(
        None,
        "number of rollouts per prompt that the momentum model generates",
        unit="rollouts",
        if_none="half of the rollouts, rounded down, for mgrpo, co_rewarding, co_rewarding_3 and dcrl; 0 for the other methods",
        at_least=0,
        group=MOMENTUM_GROUP,
    )
    decay: float = option(
        DECAY,
        "decay of the momentum model, which becomes decay x momentum model + (1 - decay) x policy after each step",
        at_least=0.0,
        below=1.0,
        group=MOMENTUM_GROUP,
    )
    decay_end: float | None = option(
        None,
        "decay of the momentum model at the last step, reached along a cosine",
        if_none="the decay is constant, except for co_rewarding and co_rewarding_3, where it ends at 0.9999",
        at_least=0.0,
        below=1.0,
        group=MOMENTUM_GROUP,
    )
    teacher: Schedule = option(
        "ema",
        "schedule of the momentum model: it follows the policy by its decay (ema), copies it every teacher_every steps and is frozen in "
        "between (hard), or copies it only while the label-free signs of the policy are healthy (gated)",
        group=MOMENTUM_GROUP,
    )
    teacher_every: int = option(
        EVERY,
        "number of steps from one copy of the policy into the momentum model to the next if the teacher is hard; the smallest such number "
        "if it is gated",
        unit="steps",
        at_least=1,
        group=MOMENTUM_GROUP,
    )
    teacher_agreement: float = option(
        AGREEMENT,
        "smallest share of the prompts on which the most frequent answers of policy and momentum model must be the same before a gated "
        "teacher copies the policy",
        at_least=0.0,
        at_most=1.0,
        group=MOMENTUM_GROUP,
    )
    teacher_votes: float | None = option(
        None,
        "largest share of the votes that the momentum model gets, where it agrees with the policy on no prompt; its share falls to that of "
        "its rollouts as the agreement rises, and some of the policy's rollouts do not vote meanwhile",
        if_none="every rollout has one vote",
        above=0.0,
        at_most=1.0,
        group=MOMENTUM_GROUP,
    )
    iqr_filter: bool | None = option(
        None,
        "prune rollouts whose entropy is unusually low among the rollouts of their prompt (the IQR filter)",
        if_none="on for mgrpo, off for the other methods",
    )
    iqr_k: float = option(
        0.75,
        "factor k of the IQR filter, which prunes a rollout if its entropy is below Q1 - k (Q3 - Q1) of its prompt's rollouts",
        at_least=0.0,
    )
    iqr_min_spread: float = option(
        0.0,
        "smallest spread at which the IQR filter prunes, as the ratio of Q3 - Q1 to the median of the entropies of a prompt's "
        "rollouts; 0 always prunes, as in the paper",
        at_least=0.0,
    )
    filter_scope: Scope = option(
        "both",
        "effect of pruning on a rollout: it neither votes nor trains (both), it does not vote (vote), or it does not vote and "
        "its reward is 0 (penalise)",
    )
    entropy_reduction: Reduction = option(
        "mean", "how the IQR filter reduces the token entropies of a rollout to one number"
    )
    momentum_scored_by: Scorer = option(
        "sampler",
        "model whose token entropies the IQR filter uses for the momentum model's rollouts: the momentum model itself (sampler) "
        "or the policy",
        group=MOMENTUM_GROUP,
    )
    train_momentum_rollouts: bool = option(
        False,
        "also train on the momentum model's rollouts, each token weighted by its probability ratio of policy to momentum model, "
        "which is bounded by behaviour_cap",
        group=MOMENTUM_GROUP,
    )
    vote_by: VoteBy = option(
        "count",
        "how much a vote counts: 1 (count), or by how far the share of its answer among the prompt's votes exceeds that among the votes "
        "on the step's other prompts on the same rank (excess), so that an answer which is given whatever the prompt cannot win",
    )
    min_share: float = option(
        0.0,
        "smallest share of a prompt's voters, including those without an answer, that the majority answer needs to become the "
        "label; below it, the prompt gets no label",
        at_least=0.0,
        at_most=1.0,
    )
    min_votes: int = option(
        2,
        "smallest number of equal answers to a prompt that makes them the label; below it, the prompt gets no label",
        unit="votes",
        at_least=1,
    )
    vote_seconds: float = option(
        5.0,
        "time that a step's vote may spend on answers with integrals, sums, products or limits; those beyond it are compared as texts",
        unit="seconds",
        at_least=0.0,
    )
    equivalence: EquivalenceName = option(
        "math", "when two answers count as equal: if they are mathematically equal (math) or the same text (exact)"
    )

    gold_labels: bool = option(
        False,
        "reward the rollouts of a prompt by its true answer where the data has one, and only the others by the method",
    )
    answer_weight: float | None = option(
        None,
        "weight of the final answer's tokens in the loss: 1 trains on them like on all others, and 0 gives them no gradient of the "
        "reward; with --gold-labels, prompts with a true answer keep the weight 1",
        if_none="0 for om_grpo, 1 for the other methods",
        at_least=0.0,
        at_most=1.0,
    )

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], section: str) -> MethodOptions:
        """Return the options that `values` holds; `section` is the name of the configuration's section, for errors.

        Raises:
            ValueError: there is no such option, or a value is out of range.
        """
        for name in values:
            checks.check_choice(section, name, [each.name for each in dataclasses.fields(cls)])
        return cls(**values)

    @property
    def row(self) -> Method:
        """The method's entry in the table of methods."""
        return METHODS[self.method]

    @property
    def filters(self) -> bool:
        """Whether the IQR filter prunes rollouts."""
        return self.row.filters if self.iqr_filter is None else self.iqr_filter

    def second_wording_count(self, rollouts: int) -> int:
        """Return how many of a prompt's G `rollouts` answer the second wording of its question, the last ones.

        Raises:
            ValueError: the policy would get fewer than two rollouts of a wording, or min_votes of those of a wording cannot agree.
        """
        if self.row.second_wording == "no":
            return 0
        if self.row.second_wording == "momentum":
            return self.momentum_count(rollouts)
        if rollouts < 4:
            raise ValueError(
                f"rollouts: expected at least 4 with method {self.method} (2 of each wording of the question, to compare with each other), "
                f"got {rollouts}"
            )
        if self.row.election == "crossed":
            self._check_min_votes(rollouts // 2)
        return rollouts // 2

    def _check_min_votes(self, voters: int) -> None:
        """Raise ValueError if no label can have min_votes, because fewer rollouts elect it."""
        if self.min_votes > voters and self.row.reads in ("label", "both"):
            raise ValueError(
                f"min_votes: expected at most {voters}, the number of rollouts that elect a label with method {self.method}, got "
                f"{self.min_votes}"
            )

    @property
    def weight_of_answer(self) -> float:
        """Weight of the final answer's tokens in the loss."""
        return self.row.answer_weight if self.answer_weight is None else self.answer_weight

    def momentum_count(self, rollouts: int) -> int:
        """Return N, the number of a prompt's G `rollouts` that the momentum model generates.

        The method's share of G is rounded down, so that the policy gets one rollout more if G is odd.

        Raises:
            ValueError: the policy would get fewer than two rollouts, or a momentum model that provides the labels none; min_votes of the
                rollouts cannot agree, because there are not so many.
        """
        if rollouts < 2:
            raise ValueError(f"rollouts: expected at least 2, to compare with each other, got {rollouts}")
        given, share = self.momentum_rollouts, self.row.momentum_share
        if given is None and share and rollouts < 3:
            raise ValueError(
                f"rollouts: expected at least 3 with method {self.method} (1 of the momentum model, and 2 of the policy to compare with "
                f"each other), got {rollouts}"
            )
        number = given if given is not None else min(max(1, int(share * rollouts)), rollouts - 2) if share else 0
        if number > rollouts - 2:
            raise ValueError(
                f"momentum_rollouts: expected at most {rollouts - 2} of {rollouts} rollouts, because the policy needs 2 to compare with "
                f"each other, got {number}"
            )
        if self.row.needs_momentum and number < 1:
            raise ValueError(
                f"momentum_rollouts: expected >= 1 with method {self.method}, which has no labels without them, got 0"
            )
        if self.teacher_votes is not None and number and self.teacher_votes <= number / rollouts:
            raise ValueError(
                f"teacher_votes: expected more than {number / rollouts:.3g}, the share of {number} of {rollouts} rollouts that vote by "
                f"themselves, got {self.teacher_votes}"
            )
        if self.row.voters == "momentum" and number < self.min_votes and self.row.reads == "label":
            raise ValueError(
                f"momentum_rollouts: expected >= {self.min_votes} with method {self.method}, whose labels take min_votes of them, got "
                f"{number}; --min-votes {number} lets so many decide"
            )
        self._check_min_votes(rollouts)
        return number

    def check_prompts(self, prompts: int) -> None:
        """Check that the options work with `prompts` prompts that vote together.

        Raises:
            ValueError: votes count by their excess over those on other prompts, and there are none.
        """
        if self.vote_by == "excess" and prompts < 2:
            raise ValueError(
                "vote_by: expected at least 2 prompts in each step with excess, which compares the answers to a prompt with those to the "
                f"others, got {prompts}"
            )

    def trained_count(self, policy_rollouts: int) -> int:
        """Return how many of a prompt's policy rollouts train. These are the first ones; the others only vote."""
        return min(policy_rollouts, max(2, round(self.row.train_share * policy_rollouts)))

    @property
    def mixes(self) -> bool:
        """Whether rollouts of both the policy and the momentum model elect the labels."""
        return self.row.voters == "survivors" and self.row.reads != "nothing"

    @property
    def last_decay(self) -> float:
        """The momentum model's decay at the last step."""
        return next(each for each in (self.decay_end, self.row.decay_end, self.decay) if each is not None)

    def decay_at(self, step: int, steps: int) -> float:
        """Return the momentum model's decay at step `step`, counted from 1, of `steps`. It follows a cosine."""
        start, end = self.decay, self.last_decay
        progress = (step - 1) / max(1, steps - 1)
        return start if start == end else end - (end - start) * 0.5 * (1.0 + math.cos(math.pi * progress))

    @property
    def schedule_text(self) -> str:
        """The momentum model's schedule, for a plan."""
        if self.teacher != "ema":
            healthy = f", if healthy and its agreement is at least {self.teacher_agreement}" * (self.teacher == "gated")
            return f"copies the policy every {self.teacher_every} steps{healthy}"
        return f"decay {self.decay}" + (f" to {self.last_decay}" if self.last_decay != self.decay else "")

    def make_teacher(self, model: nn.Module, **options: Any) -> Teacher:
        """Return the momentum model that these options describe, a copy of `model`; `options` are other arguments of :class:`Teacher`."""
        gate = Gate(self.teacher_agreement) if self.teacher == "gated" else None
        return Teacher(
            model,
            self.decay,
            schedule=self.teacher,
            every=self.teacher_every,
            gate=gate,
            most_votes=self.teacher_votes,
            **options,
        )

    def check_use(self, momentum: bool) -> None:
        """Check that every option that was set has an effect.

        Args:
            momentum: whether there is a momentum model.

        Raises:
            ValueError: an option has no effect; the message names it and what it requires.
        """
        reads = self.row.reads
        rollouts = self.momentum_rollouts != 0 and (self.momentum_rollouts or self.row.momentum_share)
        for name, is_set, needs, met in (
            ("train_momentum_rollouts", self.train_momentum_rollouts, "momentum rollouts", rollouts),
            ("momentum_scored_by", self.momentum_scored_by == "policy", "momentum rollouts", rollouts),
            ("decay_end", self.decay_end is not None, "a momentum model", momentum),
            ("teacher", self.teacher != "ema", "a momentum model", momentum),
            ("decay", self.decay != DECAY, "teacher ema", self.teacher == "ema"),
            ("decay_end", self.decay_end is not None, "teacher ema", self.teacher == "ema"),
            ("teacher_every", self.teacher_every != EVERY, "teacher hard or gated", self.teacher != "ema"),
            ("teacher", self.teacher == "gated", "momentum rollouts (for their agreement with the policy)", rollouts),
            ("teacher_agreement", self.teacher_agreement != AGREEMENT, "teacher gated", self.teacher == "gated"),
            ("teacher_votes", self.teacher_votes is not None, "momentum rollouts", rollouts),
            (
                "teacher_votes",
                self.teacher_votes is not None,
                "a method in which policy and momentum model vote",
                self.mixes,
            ),
            ("filter_scope", self.filter_scope != "both", "the IQR filter (iqr_filter)", self.filters),
            ("filter_scope", self.filter_scope == "vote", "a method that votes", reads != "nothing"),
            ("vote_by", self.vote_by != "count", "a method that votes", reads != "nothing"),
            ("min_share", self.min_share > 0, "a method that takes a label", reads in ("label", "both")),
            ("entropy_reduction", self.entropy_reduction == "sum", "the IQR filter (iqr_filter)", self.filters),
            (
                "gold_labels",
                self.gold_labels,
                "a method other than gold, which requires every true answer",
                not self.row.needs_gold,
            ),
            ("iqr_min_spread", self.iqr_min_spread > 0, "the IQR filter (iqr_filter)", self.filters),
        ):
            if is_set and not met:
                got = getattr(self, name)
                raise ValueError(f"{name}: expected {needs} with it, without which it has no effect, got {got!r}")
        if self.row.second_wording == "policy" and rollouts:
            raise ValueError(
                f"momentum_rollouts: expected 0 with method {self.method}, whose rollouts of two wordings are the policy's, got "
                f"{self.momentum_rollouts}"
            )
        if self.row.own_advantages and self.filters and self.filter_scope == "penalise":
            raise ValueError(
                f"filter_scope: expected both or vote with method {self.method}, whose advantages are not those of its rewards, got "
                "'penalise'"
            )
        if self.row.lowest < 0 and self.filters and self.filter_scope == "penalise":
            raise ValueError(
                f"filter_scope: expected both or vote with method {self.method}, whose rewards may be below the 0 that a pruned rollout "
                "would get, got 'penalise'"
            )
