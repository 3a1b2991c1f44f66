"""Accuracy on held-out prompts.

Its random numbers are its own, so that evaluating does not change training. They are the same in every evaluation, so that two evaluations
differ only where the weights do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mgrpo_kernels import majority_vote
from mgrpo_kernels.method import Gold, equal_to_gold
from mgrpo_kernels.train.config import Config
from mgrpo_kernels.train.data.task import Example, Task
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.rng import generator_for
from mgrpo_kernels.train.rollout import RolloutEngine, Rollouts
from mgrpo_kernels.train.watch.uncertainty import standard_error
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
    source: str = ""  # name of its held-out set, where sets have names

    def line(self) -> dict[str, Any]:
        """Return a line for questions.jsonl."""
        return {**self.example._asdict(), **{key: value for key, value in self._asdict().items() if key != "example"}}

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Question:
        """Return the question of a line that :meth:`line` has made."""
        gold = line["gold"]
        example = Example(line["prompt"], tuple(gold) if isinstance(gold, list) else gold)
        return cls(example, **{key: line[key] for key in cls._fields if key != "example" and key in line})


MEASURES: dict[str, Callable[[Question, int], float]] = {
    "eval_accuracy": lambda question, _: sum(question.right) / len(question.right),
    "eval_greedy": lambda question, _: float(question.greedy_right),
    "eval_pass_at_k": lambda question, k: pass_at_k(len(question.right), sum(question.right), k),
    "eval_maj_at_k": lambda question, _: float(question.majority_right),
}
"""What a question contributes to each metric, which is the mean over the questions. The second argument is the k of pass@k."""


def examine(policy: Policy, engine: RolloutEngine, task: Task, config: Config) -> list[Question]:
    """Sample every held-out prompt, and greedily once; return what came, prompt by prompt.

    The random numbers depend only on the seed and on a prompt's number.
    """
    n = config.eval.eval_samples
    prompts = policy.encode([example.prompt for example in task.held_out])
    gold = [example.gold for example in task.held_out]

    def read(rollouts: Rollouts) -> tuple[list[str], list[str | None]]:
        texts = policy.decode(rollouts.tokens, rollouts.mask)
        return texts, read_answers(task.extract, texts, rollouts.finished.tolist())

    def right(answers: Sequence[str | None], true: Sequence[Gold | None]) -> list[bool]:
        return equal_to_gold(answers, true, task.equivalence).eq(1).tolist()

    generator = generator_for(config.run.seed, "evaluation", 0, policy.device)
    sampled, answers = read(engine.sample(prompts, n, temperature=config.eval.eval_temperature, generator=generator))
    greedy, best = read(engine.sample(prompts, 1, temperature=0.0, generator=generator))
    labels = majority_vote(answers, n, equivalence=task.equivalence).labels
    hits = right(answers, [each for each in gold for _ in range(n)])
    labels_right, greedy_right = right(labels, gold), right(best, gold)
    return [
        Question(
            example,
            sampled[i * n : (i + 1) * n],
            answers[i * n : (i + 1) * n],
            hits[i * n : (i + 1) * n],
            labels[i],
            labels_right[i],
            greedy[i],
            best[i],
            greedy_right[i],
            task.sets[i] if task.sets else "",
        )
        for i, example in enumerate(task.held_out)
    ]


def values_of(questions: Sequence[Question], k: int) -> dict[str, list[float]]:
    """Return what each question contributes to each metric of :data:`MEASURES`, of all questions and of each set that has a name."""
    found = {key: [measure(each, k) for each in questions] for key, measure in MEASURES.items()}
    for source in dict.fromkeys(each.source for each in questions if each.source):
        for key, measure in MEASURES.items():
            found[f"{key}/{source}"] = [measure(each, k) for each in questions if each.source == source]
    return found


def figures(questions: Sequence[Question], k: int) -> dict[str, float | None]:
    """Return the eval_ metrics of one evaluation: means over the questions, and their standard errors."""
    found: dict[str, float | None] = {}
    for key, values in values_of(questions, k).items():
        found |= {key: math.fsum(values) / len(values), derived(key, "error"): standard_error(values)}
    return found


def derived(key: str, what: str) -> str:
    """Return the key of an error or a change: eval_accuracy_error/easy for eval_accuracy/easy."""
    name, slash, source = key.partition("/")
    return f"{name}_{what}{slash}{source}"


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the unbiased estimate, from n samples of which `correct` are right, that at least one of k is (arXiv 2107.03374)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)
