"""The filter, the vote, the rewards and the advantages of a step's rollouts, in one pure function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import checks, sequences
from mgrpo_kernels.method.election import elect, offsets_of_wordings
from mgrpo_kernels.method.gold import Gold, equal_to_gold
from mgrpo_kernels.method.options import MethodOptions
from mgrpo_kernels.method.outcome import advantages_of, at_tokens, decide, groups_by_gold, token_weights, with_rewards
from mgrpo_kernels.method.pruning import survivors
from mgrpo_kernels.method.signals import Signals
from mgrpo_kernels.ops.iqr_filter import trajectory_entropy
from mgrpo_kernels.vote import Equivalence, Vote
from mgrpo_kernels.vote.symbolic import budget


class Selection(NamedTuple):
    """The result of :func:`select` for B rollouts in P groups. All tensors are on the CPU."""

    nonempty: Tensor  # (B,) bool: the response has at least one token
    entropy: Tensor | None  # (B,) nats, as the filter compares them; NaN for an empty response; None if not given
    survives: Tensor  # (B,) bool: neither empty nor pruned
    voters: Tensor  # (B,) bool
    vote: Vote | None  # labels, shares and clusters; None if rewards were given instead
    rewards: Tensor  # (B,) float32
    trains: Tensor  # (B,) bool: the rollout is part of the loss
    advantages: Tensor  # (B,) float32, 0 for a rollout that does not train
    label_correct: Tensor  # (P,) float32: 1 if the label equals the true answer, else 0; NaN if either is unknown
    share_of_all: (
        Tensor  # (P,) float32: the winner's share of all voters, those without an answer included; 0 without a vote
    )
    distinct_answers: Tensor  # (P,) int64, number of different answers; 0 without a vote
    has_signal: Tensor  # (P,) bool: some advantage is not 0
    by_gold: Tensor  # (P,) bool: the rollouts are rewarded by the true answer
    token_weight: (
        Tensor  # (B,) float32, mean factor of the advantage over the tokens of the response; 1 for an empty one
    )
    token_advantages: (
        Tensor | None
    )  # (B, L) float32, for the loss in place of `advantages`; None if those hold at every token

    def metrics(self, prompts: int | None = None) -> dict[str, float | None]:
        """Return the metrics that every trainer logs; None for a metric that is undefined.

        Args:
            prompts: number of distinct prompts; None if every group has a prompt of its own.
        """
        known = self.label_correct[~self.label_correct.isnan()]
        metrics = {
            "reward_mean": _mean(self.rewards[self.trains]),
            "training_fraction": _mean(self.trains),
            "pruned_fraction": _mean(self.nonempty & ~self.survives),
            "gold_fraction": _mean(self.by_gold),
            "token_weight": _mean(self.token_weight[self.trains]),
            "label_accuracy": _mean(known),
            "groups_with_signal": _mean(self.has_signal),
        }
        if self.vote is None:
            return metrics
        labels = [label for label in self.vote.labels if label is not None]
        groups = len(self.vote.labels)
        return metrics | {
            "vote_share": _mean(self.vote.share),
            "vote_share_of_all": _mean(self.share_of_all),
            "labelled_fraction": len(labels) / groups if groups else None,
            "distinct_labels": len(set(labels)) / (prompts or groups) if labels else None,
            "distinct_answers": _mean(self.distinct_answers[self.distinct_answers > 0]),
        }


def select(
    mask: Tensor,
    answers: Sequence[str | None],
    groups: int | Tensor,
    options: MethodOptions,
    *,
    by_momentum: Tensor | None = None,
    may_train: Tensor | None = None,
    may_vote: Tensor | None = None,
    second_wording: Tensor | None = None,
    entropy: Tensor | None = None,
    self_certainty: Tensor | None = None,
    logprob: Tensor | None = None,
    tokens: Tensor | None = None,
    answer_tokens: Tensor | None = None,
    gold: Sequence[Gold | None] | None = None,
    rewards: Tensor | None = None,
    reward_share: float | None = None,
    equivalence: Equivalence | None = None,
    scale: str = "std",
    generator: torch.Generator | None = None,
) -> Selection:
    """Filter, vote, reward and compute advantages, in this order, within each group. The inputs are not changed.

    Args:
        mask: ``(B, L)`` bool, the tokens of each response. An empty response neither votes nor trains.
        answers: B answers; None for a response without an answer.
        groups: group size G, or ascending int offsets ``(P+1,)``. The rollouts of a prompt are contiguous.
        options: method, filter and vote.
        by_momentum: ``(B,)`` bool, the rollouts that the momentum model generated; None if there are none.
        may_train: ``(B,)`` bool, False for a rollout that may only vote, such as one cut at the length limit; None if all may train.
        may_vote: ``(B,)`` bool, False for a rollout that may not vote, whatever the filter says; None if all may vote.
        second_wording: ``(B,)`` bool, the rollouts that answer another wording of the question, the last of each group. Required by some
            methods, whose advantages compare the policy's rollouts of the same wording; None if all answer the same.
        entropy: ``(B, L)`` entropy of each token, nats. Required by the filter and by some methods.
        self_certainty: ``(B, L)`` self-certainty of each token. Required by some methods.
        logprob: ``(B, L)`` log-probability of each token. Required by some methods.
        tokens: ``(B, L)`` int64 token ids. Required by some methods.
        answer_tokens: ``(B, L)`` bool, as :func:`answer_tokens` finds them. Required where the answer's tokens have a weight below 1.
        gold: B true answers, the same within a group, None if unknown. Required by some methods.
        rewards: ``(B,)`` float, used instead of the method's; there is then no vote. A rollout with reward NaN does not train.
        reward_share: share of `rewards` in a sum with the method's rewards; there is then a vote. None: `rewards` alone, without a vote.
        equivalence: used instead of ``options.equivalence``; may be a function.
        scale: scale of the advantages, as in :func:`mgrpo_kernels.group_advantages`.
        generator: random number generator, required by some methods.

    Raises:
        ValueError: a shape is wrong, or an input that the method or the filter requires is missing.
    """
    checks.check_tensor("mask", mask, dtypes=(torch.bool,), dim=2)
    votes = rewards is None or reward_share is not None
    given = {
        "entropy": entropy,
        "self_certainty": self_certainty,
        "logprob": logprob,
        "tokens": tokens,
        "answer_tokens": answer_tokens,
    }
    _check(mask, options, answers, votes, given, gold, generator)
    if options.row.second_wording != "no" and votes and second_wording is None:
        raise ValueError(f"second_wording: expected a value, which method {options.method} requires, got None")
    B = len(mask)
    mean_entropy, mean_certainty = _reduced(entropy, mask), _reduced(self_certainty, mask)
    level = _reduced(entropy, mask, options.entropy_reduction)
    offsets = sequences.group_offsets(groups.cpu() if isinstance(groups, Tensor) else groups, B, torch.device("cpu"))
    momentum = _flags("by_momentum", by_momentum, B, False)
    same: Equivalence = options.equivalence if equivalence is None else equivalence
    reworded = _flags("second_wording", second_wording, B, False)
    # The rollouts whose advantages are relative to each other.
    parts = offsets if second_wording is None else offsets_of_wordings(offsets, reworded)
    nonempty = mask.any(-1).cpu()
    survives = _survives(options, level, offsets, nonempty)
    voters = survives & momentum if options.row.voters == "momentum" else survives
    voters = voters & _flags("may_vote", may_vote, B, True)
    trains = who_trains(options, offsets, momentum, survives, nonempty) & _flags("may_train", may_train, B, True)
    by_gold = groups_by_gold(options, offsets, gold if votes else None)
    vote, outcome, weights = None, None, voters.float()
    if votes:
        with budget(options.vote_seconds):  # one for all elections
            vote, weights = elect(
                options,
                answers,
                offsets,
                voters,
                certainty=mean_certainty,
                second=reworded if options.row.second_wording == "policy" else momentum,
                equivalence=same,
            )
        reads_gold = options.row.needs_gold or options.gold_labels
        correct = equal_to_gold(answers, gold, same) if reads_gold and gold is not None else None
        signals = Signals(
            vote,
            offsets,
            nonempty,
            entropy=mean_entropy,
            self_certainty=mean_certainty,
            correct=correct,
            generator=generator,
            voters=voters,
            by_momentum=momentum,
            trains=trains,
            scale=scale,
            mask=mask.cpu(),
            token_entropy=_on_cpu(entropy, options.row.needs_entropy),
            logprob=_on_cpu(logprob, options.row.needs_logprob),
            tokens=_on_cpu(tokens, options.row.needs_tokens),
        )
        outcome = decide(options, signals, by_gold)
    outcome = with_rewards(outcome, rewards, reward_share)
    trains = trains & ~outcome.rewards.isnan() & _flags("trains", outcome.trains, B, True)
    if options.filter_scope == "penalise":
        outcome = outcome._replace(rewards=torch.where(survives, outcome.rewards, 0.0))
    advantages = advantages_of(outcome, parts, trains, scale)
    voted = ~by_gold[sequences.group_index(offsets, B)]
    factors = token_weights(outcome.token_weights, answer_tokens, options.weight_of_answer, voted)
    token_weight, token_advantages = at_tokens(advantages, trains, mask.cpu(), factors, outcome.token_bonus)
    signal = (advantages[:, None] if token_advantages is None else token_advantages).any(-1)
    return Selection(
        nonempty,
        level,
        survives,
        voters,
        vote,
        outcome.rewards,
        trains,
        advantages,
        _label_correct(vote, offsets, gold, same),
        *_of_groups(vote, offsets, weights, signal),
        by_gold,
        token_weight,
        token_advantages,
    )


def _of_groups(vote: Vote | None, offsets: Tensor, weights: Tensor, signal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `share_of_all`, `distinct_answers` and `has_signal` of a :class:`Selection`; `weights` are 0 for rollouts that do not vote."""
    groups, group = len(offsets) - 1, sequences.group_index(offsets, len(weights))

    def total(values: Tensor) -> Tensor:
        return torch.zeros(groups, dtype=torch.float32).index_add(0, group, values.float())

    has_signal = total(signal) > 0
    if vote is None:
        return torch.zeros(groups, dtype=torch.float32), torch.zeros(groups, dtype=torch.long), has_signal
    everybody = total(weights)
    share = vote.share * total(weights * (vote.cluster >= 0)) / torch.where(everybody > 0, everybody, 1.0)
    highest = torch.full((groups,), -1, dtype=torch.int64).scatter_reduce(0, group, vote.cluster, "amax")
    return share, highest + 1, has_signal


def who_trains(options: MethodOptions, offsets: Tensor, momentum: Tensor, survives: Tensor, nonempty: Tensor) -> Tensor:
    """Return which rollouts the filter and the method let train, ``(B,)`` bool.

    In each group these are the policy's first rollouts, as many as the method trains on. The momentum model's rollouts train only with
    ``options.train_momentum_rollouts``.
    """
    group = sequences.group_index(offsets, len(momentum))
    policy = (~momentum).long()
    before = torch.cat([policy.new_zeros(1), policy.cumsum(0)])  # (B+1,) number of policy rollouts before each rollout
    most = torch.tensor([options.trained_count(int(each)) for each in before[offsets].diff()], dtype=torch.long)
    trains = ~momentum & (before[:-1] - before[offsets][group] < most[group]) if len(group) else ~momentum
    if options.train_momentum_rollouts:
        trains = trains | momentum
    return trains & (survives if options.filter_scope == "both" else nonempty)


def _check(
    mask: Tensor,
    options: MethodOptions,
    answers: Sequence[str | None],
    votes: bool,
    given: dict[str, Tensor | None],
    gold: Sequence[Gold | None] | None,
    generator: torch.Generator | None,
) -> None:
    """Raise ValueError for an input whose size differs from the mask's, or that is required and missing."""
    row, method, B = options.row, f"method {options.method}", len(mask)
    if given["entropy"] is None and options.filters:
        raise ValueError("entropy: expected a value, which the IQR filter requires, got None")
    for name, value, needed in (
        ("entropy", given["entropy"], row.needs_entropy),
        ("self_certainty", given["self_certainty"], row.needs_self_certainty),
        ("logprob", given["logprob"], row.needs_logprob),
        ("tokens", given["tokens"], row.needs_tokens),
        ("gold", gold, row.needs_gold),
        ("generator", generator, row.needs_generator),
    ):
        if needed and votes and value is None:
            raise ValueError(f"{name}: expected a value, which {method} requires, got None")
    if given["answer_tokens"] is None and options.weight_of_answer < 1.0:
        raise ValueError(
            f"answer_tokens: expected a value, which answer_weight {options.weight_of_answer:g} requires, got None"
        )
    dtypes = {"tokens": (torch.int64,), "answer_tokens": (torch.bool,)}
    for name, value in given.items():
        if value is not None:
            checks.check_tensor(name, value, dtypes=dtypes.get(name, checks.FLOATS), shape=mask.shape)
    for name, rows in (("answers", answers), ("gold", gold)):
        if rows is not None and len(rows) != B:
            raise ValueError(f"{name}: expected one for each of the {B} rollouts, got {len(rows)}")
    if votes and row.needs_gold and gold is not None and None in gold:
        raise ValueError(
            f"gold: expected a true answer for every rollout with {method}, got None at {list(gold).index(None)}; another method "
            "with gold_labels rewards only the known ones by it"
        )


def _survives(options: MethodOptions, level: Tensor | None, offsets: Tensor, nonempty: Tensor) -> Tensor:
    """Return which rollouts are neither empty nor pruned, ``(B,)`` bool."""
    if not options.filters:
        return nonempty
    assert level is not None
    return survivors(level, offsets, k=options.iqr_k, min_spread=options.iqr_min_spread)


def _on_cpu(values: Tensor | None, needed: bool) -> Tensor | None:
    return values.cpu() if needed and values is not None else None


def _flags(name: str, value: Tensor | None, B: int, default: bool) -> Tensor:
    if value is None:
        return torch.full((B,), default, dtype=torch.bool)
    return checks.check_tensor(name, value, dtypes=(torch.bool,), shape=(B,)).cpu()


def _reduced(values: Tensor | None, mask: Tensor, reduction: str = "mean") -> Tensor | None:
    """Return each rollout's mean or sum of a token statistic, ``(B,)``."""
    return None if values is None else trajectory_entropy(values, mask=mask, reduction=reduction).cpu()


def _label_correct(
    vote: Vote | None, offsets: Tensor, gold: Sequence[Gold | None] | None, equivalence: Equivalence
) -> Tensor:
    """Return whether each group's label equals its true answer, ``(P,)`` float32."""
    starts, ends = offsets[:-1].tolist(), offsets[1:].tolist()
    if vote is None or gold is None:
        return torch.full((len(starts),), torch.nan, dtype=torch.float32)
    true = [gold[start] if start < end else None for start, end in zip(starts, ends, strict=True)]
    known = [each if label is not None else None for label, each in zip(vote.labels, true, strict=True)]
    return equal_to_gold(vote.labels, known, equivalence)


def _mean(values: Tensor) -> float | None:
    return float(values.float().mean()) if values.numel() else None
