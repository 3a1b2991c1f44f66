"""Accuracy on held-out prompts. Its random numbers are its own: evaluating does not change training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mgrpo_kernels import majority_vote
from mgrpo_kernels.method import Gold, equal_to_gold
from mgrpo_kernels.train.config import Config
from mgrpo_kernels.train.data.task import Example, Task
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.rng import generator_for
from mgrpo_kernels.train.rollout import RolloutEngine, Rollouts
from mgrpo_kernels.vote.extraction import read_answers


class Question(NamedTuple):
    """What a model makes of one held-out prompt: n samples, their majority, and the greedy answer."""

    example: Example
    responses: list[str]  # n
    answers: list[str | None]  # n; None where none was found
    right: list[bool]  # n
    majority: str | None
    majority_right: bool
    greedy_response: str
    greedy: str | None
    greedy_right: bool

    def line(self) -> dict[str, Any]:
        """Return a line for questions.jsonl."""
        return {**self.example._asdict(), **{key: value for key, value in self._asdict().items() if key != "example"}}


def evaluate(policy: Policy, engine: RolloutEngine, task: Task, config: Config, step: int) -> dict[str, float]:
    """Sample every held-out prompt, and greedily once; return the eval_ metrics of :data:`mgrpo_kernels.train.watch.metrics.KEYS`."""
    return figures(examine(policy, engine, task, config, step), config.pass_k)


def examine(policy: Policy, engine: RolloutEngine, task: Task, config: Config, step: int) -> list[Question]:
    """Sample every held-out prompt, and greedily once; return what came, prompt by prompt."""
    n = config.eval.eval_samples
    prompts = policy.encode([example.prompt for example in task.held_out])
    gold = [example.gold for example in task.held_out]

    def read(rollouts: Rollouts) -> tuple[list[str], list[str | None]]:
        texts = policy.decode(rollouts.tokens, rollouts.mask)
        return texts, read_answers(task.extract, texts, rollouts.finished.tolist())

    def right(answers: Sequence[str | None], true: Sequence[Gold | None]) -> list[bool]:
        return equal_to_gold(answers, true, task.equivalence).eq(1).tolist()

    generator = generator_for(config.run.seed, "evaluation", step, policy.device)
    sampled, answers = read(engine.sample(prompts, n, temperature=config.eval.eval_temperature, generator=generator))
    greedy, best = read(engine.sample(prompts, 1, temperature=0.0, generator=generator))
    labels = majority_vote(answers, n, equivalence=task.equivalence).labels
    hits = right(answers, [each for each in gold for _ in range(n)])
    labels_right, greedy_right = right(labels, gold), right(best, gold)
    return [
        Question(
            example, sampled[i * n : (i + 1) * n], answers[i * n : (i + 1) * n], hits[i * n : (i + 1) * n],
            labels[i], labels_right[i], greedy[i], best[i], greedy_right[i],
        )
        for i, example in enumerate(task.held_out)
    ]  # fmt: skip


def figures(questions: Sequence[Question], k: int) -> dict[str, float]:
    """Return the eval_ metrics: means over the questions."""

    def mean(values: Iterable[float]) -> float:
        return math.fsum(values) / len(questions)

    return {
        "eval_accuracy": mean(sum(each.right) / len(each.right) for each in questions),
        "eval_greedy": mean(each.greedy_right for each in questions),
        "eval_pass_at_k": mean(pass_at_k(len(each.right), sum(each.right), k) for each in questions),
        "eval_maj_at_k": mean(each.majority_right for each in questions),
    }


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the unbiased estimate, from n samples of which `correct` are right, that at least one of k is (arXiv 2107.03374)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)
