"""Accuracy on held-out prompts. Its random numbers are its own: evaluating does not change training."""

from __future__ import annotations

import math

from mgrpo_kernels import majority_vote
from mgrpo_kernels.train.config import Config
from mgrpo_kernels.train.data import Task, equal_to_gold
from mgrpo_kernels.train.policy import Policy
from mgrpo_kernels.train.rollout import Engine, Rollouts
from mgrpo_kernels.train.streams import stream


def evaluate(policy: Policy, engine: Engine, task: Task, config: Config, step: int) -> dict[str, float]:
    """Sample every held-out prompt, and greedily once; return the eval_ metrics of :data:`mgrpo_kernels.train.metrics.KEYS`."""
    n = config.eval.eval_samples
    prompts = policy.encode([example.prompt for example in task.held_out])
    gold = [example.gold for example in task.held_out]

    def answers(rollouts: Rollouts) -> list[str | None]:
        return [task.extract(text) for text in policy.decode(rollouts.tokens, rollouts.mask)]

    generator = stream(config.run.seed, "evaluation", step, policy.device)
    sampled = answers(engine.sample(prompts, n, temperature=config.eval.eval_temperature, generator=generator))
    greedy = answers(engine.sample(prompts, 1, temperature=0.0, generator=generator))
    correct = equal_to_gold(sampled, [each for each in gold for _ in range(n)], task.equivalence).view(-1, n)  # (P, n)
    labels = majority_vote(sampled, n, equivalence=task.equivalence).labels
    right = [int(row.sum()) for row in correct]
    return {
        "eval_accuracy": float(correct.mean()),
        "eval_greedy": float(equal_to_gold(greedy, gold, task.equivalence).mean()),
        "eval_pass_at_k": sum(pass_at_k(n, c, config.pass_k) for c in right) / len(right),
        "eval_maj_at_k": float(equal_to_gold(labels, gold, task.equivalence).mean()),
    }


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the unbiased estimate, from n samples of which `correct` are right, that at least one of k is."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)
