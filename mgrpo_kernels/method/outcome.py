"""What a method's outcome means for the loss: true answers in its place, given rewards beside it, advantages, weights of the tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mgrpo_kernels import sequences
from mgrpo_kernels.method.gold import Gold
from mgrpo_kernels.method.options import MethodOptions
from mgrpo_kernels.method.signals import Outcome, Signals
from mgrpo_kernels.ops.policy_loss import group_advantages


def decide(options: MethodOptions, signals: Signals, by_gold: Tensor) -> Outcome:
    """Return what the method decides, and for the groups in `by_gold`, ``(P,)`` bool, rewards by the true answer."""
    found = options.row.rewards(signals)
    outcome = found if isinstance(found, Outcome) else Outcome(found)
    if options.row.needs_gold or not by_gold.any():
        return outcome
    assert signals.correct is not None
    offsets, golden = signals.offsets, by_gold[sequences.group_index(signals.offsets, len(signals.correct))]
    supervised = group_advantages(
        signals.correct.nan_to_num(nan=0.0), offsets, mask=signals.trains, scale=signals.scale
    )

    def unless_golden(values: Tensor | None, instead: Tensor | float | bool) -> Tensor | None:
        if values is None:
            return None
        return torch.where(golden if values.dim() == 1 else golden[:, None], instead, values)

    return Outcome(
        torch.where(golden, signals.correct, outcome.rewards),
        unless_golden(outcome.advantages, supervised),
        unless_golden(outcome.token_weights, 1.0),
        unless_golden(outcome.token_bonus, 0.0),
        unless_golden(outcome.trains, True),
    )


def with_rewards(outcome: Outcome | None, rewards: Tensor | None, share: float | None) -> Outcome:
    """Return the outcome with the given rewards in place of the method's, or as `share` of a sum with them."""
    if rewards is None:
        assert outcome is not None
        return outcome
    rewards = rewards.float().cpu()
    if outcome is None or share is None:
        return Outcome(rewards)
    if outcome.advantages is not None:
        raise ValueError(
            "reward_share: expected a method whose advantages follow from its rewards, got one that computes advantages itself"
        )
    return outcome._replace(rewards=share * rewards + (1.0 - share) * outcome.rewards)


def groups_by_gold(options: MethodOptions, offsets: Tensor, gold: Sequence[Gold | None] | None) -> Tensor:
    """Return which groups are rewarded by their true answer, ``(P,)`` bool."""
    starts, ends = offsets[:-1].tolist(), offsets[1:].tolist()
    if gold is None or not (options.gold_labels or options.row.needs_gold):
        return torch.zeros(len(starts), dtype=torch.bool)
    known = [start < end and gold[start] is not None for start, end in zip(starts, ends, strict=True)]
    return torch.tensor(known, dtype=torch.bool)


def advantages_of(outcome: Outcome, offsets: Tensor, trains: Tensor, scale: str) -> Tensor:
    """Return the method's own advantages, or else the group advantages of the rewards, ``(B,)``; 0 for a rollout that does not train."""
    if outcome.advantages is not None:
        return torch.where(trains, outcome.advantages, 0.0)
    return group_advantages(outcome.rewards.nan_to_num(nan=0.0), offsets, mask=trains, scale=scale)


def token_weights(
    weights: Tensor | None, answer_tokens: Tensor | None, weight_of_answer: float, weighted: Tensor
) -> Tensor | None:
    """Return the factors of the advantage at each token, ``(B, L)``; the answer's tokens count only for the rollouts `weighted`."""
    if weight_of_answer == 1.0:
        return weights
    assert answer_tokens is not None
    of_answer = torch.where(answer_tokens.cpu() & weighted[:, None], weight_of_answer, 1.0)
    return of_answer if weights is None else weights * of_answer


def at_tokens(
    advantages: Tensor, trains: Tensor, mask: Tensor, weights: Tensor | None, bonus: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return `token_weight` and `token_advantages` of a :class:`Selection`."""
    if weights is None and bonus is None:
        return torch.ones(len(mask), dtype=torch.float32), None
    weights = torch.where(mask, torch.ones((), dtype=torch.float32) if weights is None else weights.float(), 0.0)
    lengths = mask.sum(-1)
    token_weight = torch.where(lengths > 0, weights.sum(-1) / lengths.clamp(min=1), 1.0)
    found = advantages.cpu()[:, None] * weights + (0.0 if bonus is None else bonus)
    return token_weight, torch.where(mask & trains[:, None], found, 0.0)
