"""What a step shows of itself: the figures that tell learning from collapse, and a few samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mgrpo_kernels import TokenStats
from mgrpo_kernels.method import Selection
from mgrpo_kernels.train.data.task import Example
from mgrpo_kernels.train.rollout import Rollouts


class Trajectories(NamedTuple):
    """The B = P x G rollouts of a step, those of one prompt together, and what they answer."""

    prompts: list[list[int]]  # token ids, once for each rollout
    rollouts: Rollouts
    by_policy: Tensor  # (B,) bool: sampled by the policy, not by the momentum model
    texts: list[str]
    answers: list[str | None]
    gold: list[str | None]


def step_metrics(
    examples: Sequence[Example], seen: Trajectories, stats: TokenStats, selection: Selection
) -> dict[str, Any]:
    """Return figures by their names in :data:`mgrpo_kernels.train.watch.metrics.KEYS`."""
    assert stats.logprob is not None
    assert stats.entropy is not None
    mask = seen.rollouts.mask
    answers = Counter(answer for answer in seen.answers if answer is not None)
    return {
        **selection.metrics(prompts=len({example.prompt for example in examples})),
        "top_answer_share": max(answers.values()) / answers.total() if answers else None,
        "entropy": mean(stats.entropy[mask & seen.by_policy[:, None]]),
        "behaviour_mismatch": mean((stats.logprob - seen.rollouts.logprobs)[mask].abs()),
        "response_tokens": mean(mask.sum(-1)),
    }


def sample_lines(
    step: int, example: Example, seen: Trajectories, selection: Selection, group: int, number: int
) -> list[dict[str, Any]]:
    """Return lines for samples.jsonl: `number` rollouts of the step's first prompt."""
    assert selection.vote is not None
    assert selection.entropy is not None
    return [
        {
            "step": step,
            "prompt": example.prompt,
            "response": seen.texts[row],
            "answer": seen.answers[row],
            "label": selection.vote.labels[0],
            "gold": example.gold,
            "reward": float(selection.rewards[row]),
            "advantage": float(selection.advantages[row]),
            "entropy": float(selection.entropy[row]),
            "pruned": bool(selection.nonempty[row] & ~selection.survives[row]),
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
