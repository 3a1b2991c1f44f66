"""What a step shows of itself: the figures that tell learning from collapse, and a few samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mgrpo_kernels import TokenStats, Vote
from mgrpo_kernels.train.data import Example, equal_to_gold
from mgrpo_kernels.train.rollout import Rollouts
from mgrpo_kernels.vote import Equivalence


class Trajectories(NamedTuple):
    """The B = P x G rollouts of a step, those of one prompt together, and what they answer."""

    prompts: list[list[int]]  # token ids, once for each rollout
    rollouts: Rollouts
    place: Tensor  # (B,) int64 among the rollouts of the prompt: the policy's come first
    by_policy: Tensor  # (B,) bool: sampled by the policy, not by the momentum model
    texts: list[str]
    answers: list[str | None]
    gold: list[str | None]

    @property
    def nonempty(self) -> Tensor:
        return self.rollouts.mask.any(-1)  # (B,)


class Judgement(NamedTuple):
    """What the method makes of them."""

    entropy: Tensor  # (B,) nats
    survives: Tensor  # (B,) bool: not pruned, not empty
    vote: Vote
    rewards: Tensor  # (B,)
    trains: Tensor  # (B,) bool
    advantages: Tensor  # (B,)


def step_metrics(
    examples: Sequence[Example], seen: Trajectories, stats: TokenStats, judged: Judgement, equivalence: Equivalence
) -> dict[str, Any]:
    """Return figures by their names in :data:`mgrpo_kernels.train.metrics.KEYS`."""
    assert stats.logprob is not None
    assert stats.entropy is not None
    mask, labels = seen.rollouts.mask, judged.vote.labels
    answers = Counter(answer for answer in seen.answers if answer is not None)
    correct = equal_to_gold(labels, [example.gold for example in examples], equivalence)
    different = {label for label in labels if label is not None}
    return {
        "reward_mean": mean(judged.rewards[judged.trains]),
        "vote_share": mean(judged.vote.share),
        "label_accuracy": mean(correct[~correct.isnan()]),
        "distinct_labels": len(different) / len({example.prompt for example in examples}),
        "top_answer_share": max(answers.values()) / answers.total() if answers else None,
        "pruned_fraction": mean((seen.nonempty & ~judged.survives).float()),
        "entropy": mean(stats.entropy[mask & seen.by_policy[:, None]]),
        "behaviour_mismatch": mean((stats.logprob - seen.rollouts.logprobs)[mask].abs()),
        "response_tokens": mean(mask.sum(-1)),
    }


def sample_lines(
    step: int, example: Example, seen: Trajectories, judged: Judgement, group: int, number: int
) -> list[dict[str, Any]]:
    """Return lines for samples.jsonl: `number` rollouts of the step's first prompt."""
    return [
        {
            "step": step,
            "prompt": example.prompt,
            "response": seen.texts[row],
            "answer": seen.answers[row],
            "label": judged.vote.labels[0],
            "gold": example.gold,
            "reward": float(judged.rewards[row]),
            "advantage": float(judged.advantages[row]),
            "entropy": float(judged.entropy[row]),
            "pruned": bool(seen.nonempty[row] & ~judged.survives[row]),
            "finished": bool(seen.rollouts.finished[row]),
            "sampled_by": "policy" if seen.by_policy[row] else "momentum",
        }
        for row in spread(group, number)
    ]


def mean(values: Tensor) -> float | None:
    """Return the mean, or None of nothing."""
    return float(values.float().mean()) if values.numel() else None


def spread(size: int, number: int) -> list[int]:
    """Return at most `number` of range(size), evenly spread, both ends included."""
    if number < 2:
        return list(range(number))
    return sorted({round(i * (size - 1) / (number - 1)) for i in range(number)})
