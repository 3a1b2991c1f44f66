"""What becomes of a step's rollouts: filter, vote, reward, and who trains with which advantage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import checks, sequences
from mgrpo_kernels.method.gold import equal_to_gold
from mgrpo_kernels.method.methods import Signals
from mgrpo_kernels.method.options import MethodOptions
from mgrpo_kernels.method.pruning import survivors
from mgrpo_kernels.ops.iqr_filter import trajectory_entropy
from mgrpo_kernels.ops.policy_loss import group_advantages
from mgrpo_kernels.vote import Equivalence, Vote, majority_vote


class Selection(NamedTuple):
    """What becomes of B rollouts in P groups; tensors are on the CPU."""

    nonempty: Tensor  # (B,) bool: the response has a token
    entropy: Tensor | None  # (B,) as the filter saw it, nats; NaN for an empty response; None where none was given
    survives: Tensor  # (B,) bool: neither empty nor pruned
    voters: Tensor  # (B,) bool
    vote: Vote | None  # labels, shares, clusters; None where rewards were given in its place
    rewards: Tensor  # (B,) float32
    trains: Tensor  # (B,) bool: the loss sees it
    advantages: Tensor  # (B,) float32, 0 for a rollout that does not train
    label_correct: Tensor  # (P,) float32: 1 where the label equals the true answer, else 0; NaN where that is not known

    def metrics(self, prompts: int | None = None) -> dict[str, float | None]:
        """Return the figures that every trainer logs; None for one that does not exist.

        Args:
            prompts: number of distinct prompts; None: the groups are of distinct ones.
        """
        known = self.label_correct[~self.label_correct.isnan()]
        figures = {
            "reward_mean": _mean(self.rewards[self.trains]),
            "training_fraction": _mean(self.trains),
            "pruned_fraction": _mean(self.nonempty & ~self.survives),
            "label_accuracy": _mean(known),
        }
        if self.vote is None:
            return figures
        labels = [label for label in self.vote.labels if label is not None]
        groups = len(self.vote.labels)
        return figures | {
            "vote_share": _mean(self.vote.share),
            "labelled_fraction": len(labels) / groups if groups else None,
            "distinct_labels": len(set(labels)) / (prompts or groups) if groups else None,
        }


def select(
    mask: Tensor,
    answers: Sequence[str | None],
    groups: int | Tensor,
    options: MethodOptions,
    *,
    by_momentum: Tensor | None = None,
    may_train: Tensor | None = None,
    entropy: Tensor | None = None,
    self_certainty: Tensor | None = None,
    gold: Sequence[str | None] | None = None,
    rewards: Tensor | None = None,
    equivalence: Equivalence | None = None,
    scale: str = "std",
    generator: torch.Generator | None = None,
) -> Selection:
    """Filter, vote, reward and take advantages, in this order, within each group. Nothing but the result changes.

    Args:
        mask: ``(B, L)`` bool, the tokens of each response. A response without any neither votes nor trains.
        answers: B answers; None for a response without one.
        groups: group size G, or ascending int offsets ``(P+1,)``: the rollouts of a prompt are neighbours.
        options: method, filter and vote.
        by_momentum: ``(B,)`` bool, which rollouts the momentum model sampled; None: none.
        may_train: ``(B,)`` bool, False for a rollout that votes but must not train, such as one cut at the length limit; None: all may.
        entropy: ``(B, L)`` of each token, nats. The filter and some methods need it.
        self_certainty: ``(B, L)`` of each token. Some methods need it.
        gold: B true answers, the same throughout a group, or None where it is not known. Some methods need it.
        rewards: ``(B,)`` float, in place of the method's: no vote is held. NaN: the rollout has none, and does not train.
        equivalence: in place of ``options.equivalence``, which may then be a function.
        scale: of the advantages, as in :func:`mgrpo_kernels.group_advantages`.
        generator: for methods that draw random numbers.

    Raises:
        ValueError: the wrong shape, or without something that the method or the filter needs.
    """
    checks.check_tensor("mask", mask, dtypes=(torch.bool,), dim=2)
    B = len(mask)
    offsets = sequences.group_offsets(groups.cpu() if isinstance(groups, Tensor) else groups, B, torch.device("cpu"))
    _check(B, options, mask, answers, rewards is None, entropy, self_certainty, gold, generator)
    momentum = _flags("by_momentum", by_momentum, B, False)
    same: Equivalence = options.equivalence if equivalence is None else equivalence
    nonempty = mask.any(-1).cpu()
    level = (
        None if entropy is None else trajectory_entropy(entropy, mask=mask, reduction=options.entropy_reduction).cpu()
    )

    survives = nonempty
    if options.filters:
        assert level is not None
        survives = survivors(level, offsets, k=options.iqr_k, min_spread=options.iqr_min_spread)
    voters = survives & momentum if options.row.voters == "momentum" else survives
    vote = None
    if rewards is None:
        vote = majority_vote(answers, offsets, voters=voters, equivalence=same, min_share=options.min_share)
        correct = equal_to_gold(answers, gold, same) if options.row.needs_gold and gold is not None else None
        rewards = _rewards(options, vote, offsets, mask, entropy, self_certainty, correct, generator)
    rewards = rewards.float().cpu()
    trains = who_trains(options, offsets, momentum, survives, nonempty) & _flags("may_train", may_train, B, True)
    trains &= ~rewards.isnan()
    if options.filter_scope == "penalise":
        rewards = torch.where(survives, rewards, 0.0)
    advantages = group_advantages(rewards.nan_to_num(nan=0.0), offsets, mask=trains, scale=scale)
    correct = _label_correct(vote, offsets, gold, same)
    return Selection(nonempty, level, survives, voters, vote, rewards, trains, advantages, correct)


def _rewards(
    options: MethodOptions,
    vote: Vote,
    offsets: Tensor,
    mask: Tensor,
    entropy: Tensor | None,
    self_certainty: Tensor | None,
    correct: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the method's rewards, ``(B,)``."""
    row = options.row
    signals = Signals(
        vote=vote,
        offsets=offsets,
        nonempty=mask.any(-1).cpu(),
        entropy=_token_mean(entropy, mask) if row.needs_entropy else None,
        self_certainty=_token_mean(self_certainty, mask) if row.needs_self_certainty else None,
        correct=correct,
        generator=generator,
    )
    return row.rewards(signals)


def who_trains(options: MethodOptions, offsets: Tensor, momentum: Tensor, survives: Tensor, nonempty: Tensor) -> Tensor:
    """Return which rollouts the loss sees, ``(B,)`` bool, as far as filter and method decide it.

    The first rollouts of the policy's in each group, as many as the method trains on, and the momentum model's only where asked for.
    """
    group = sequences.group_index(offsets, len(momentum))
    policy = (~momentum).long()
    before = torch.cat([policy.new_zeros(1), policy.cumsum(0)])  # (B+1,) rollouts of the policy before each
    most = torch.tensor([options.trained_count(int(each)) for each in before[offsets].diff()], dtype=torch.long)
    trains = ~momentum & (before[:-1] - before[offsets][group] < most[group]) if len(group) else ~momentum
    if options.train_momentum_rollouts:
        trains = trains | momentum
    return trains & (survives if options.filter_scope == "both" else nonempty)


def _check(
    B: int,
    options: MethodOptions,
    mask: Tensor,
    answers: Sequence[str | None],
    votes: bool,
    entropy: Tensor | None,
    self_certainty: Tensor | None,
    gold: Sequence[str | None] | None,
    generator: torch.Generator | None,
) -> None:
    """Raise ValueError where something has another size than the mask, or is needed and absent."""
    row, method = options.row, f"method {options.method}"
    for name, value, needed, by in (
        ("entropy", entropy, options.filters, "the IQR filter"),
        ("entropy", entropy, votes and row.needs_entropy, method),
        ("self_certainty", self_certainty, votes and row.needs_self_certainty, method),
        ("gold", gold, votes and row.needs_gold, method),
        ("generator", generator, votes and row.needs_generator, method),
    ):
        if needed and value is None:
            raise ValueError(f"{name}: expected it with {by}, got None")
    for name, value in (("entropy", entropy), ("self_certainty", self_certainty)):
        if value is not None:
            checks.check_tensor(name, value, shape=mask.shape)
    for name, rows in (("answers", answers), ("gold", gold)):
        if rows is not None and len(rows) != B:
            raise ValueError(f"{name}: expected one for each of the {B} rollouts, got {len(rows)}")
    if votes and row.needs_gold and gold is not None and None in gold:
        raise ValueError(
            f"gold: expected a true answer for every rollout with {method}, got None at {list(gold).index(None)}"
        )


def _flags(name: str, value: Tensor | None, B: int, default: bool) -> Tensor:
    if value is None:
        return torch.full((B,), default)
    return checks.check_tensor(name, value, dtypes=(torch.bool,), shape=(B,)).cpu()


def _token_mean(values: Tensor | None, mask: Tensor) -> Tensor | None:
    return None if values is None else trajectory_entropy(values, mask=mask).cpu()


def _label_correct(
    vote: Vote | None, offsets: Tensor, gold: Sequence[str | None] | None, equivalence: Equivalence
) -> Tensor:
    """Return whether each group's label is its true answer, ``(P,)``."""
    starts, ends = offsets[:-1].tolist(), offsets[1:].tolist()
    if vote is None or gold is None:
        return torch.full((len(starts),), torch.nan)
    true = [gold[start] if start < end else None for start, end in zip(starts, ends, strict=True)]
    return equal_to_gold(vote.labels, true, equivalence)


def _mean(values: Tensor) -> float | None:
    return float(values.float().mean()) if values.numel() else None
