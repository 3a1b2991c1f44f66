"""Evaluation: its figures by hand, and that it leaves training alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tiny
import torch

from mgrpo_kernels.train.data import Example, Task
from mgrpo_kernels.train.demo import after_hash, make_task
from mgrpo_kernels.train.evaluate import evaluate, pass_at_k
from mgrpo_kernels.train.metrics import EVALUATION
from mgrpo_kernels.train.policy import Policy
from mgrpo_kernels.train.rollout import Rollouts


@pytest.mark.parametrize(
    ("n", "correct", "k"), [(4, 0, 2), (4, 1, 1), (4, 1, 3), (5, 2, 2), (6, 3, 4), (3, 3, 3), (8, 8, 1)]
)
def test_pass_at_k_is_the_mean_over_all_choices(n: int, correct: int, k: int) -> None:
    samples = [1] * correct + [0] * (n - correct)
    choices = list(itertools.combinations(samples, k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(max, choices)) / len(choices))


class Scripted:
    """Two held-out prompts: one is right twice of four and by majority, the other once and not by majority."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def sample(
        self, prompts: Any, copies: int, *, temperature: float, generator: torch.Generator, momentum: Any = None
    ) -> Rollouts:
        texts = ["#7$", "#2$"] if temperature == 0 else ["#7$", "#7$", "#1$", "#2$", "#3$", "#3$", "#5$", "77$"]
        assert len(texts) == len(prompts) * copies
        tokens = torch.tensor(self.policy.encode(texts))
        mask = torch.ones(tokens.shape, dtype=torch.bool)
        return Rollouts(tokens, mask, torch.zeros(tokens.shape), torch.ones(len(texts), dtype=torch.bool))


def test_figures_by_hand(policy: Policy) -> None:
    task = Task([], [Example("3+4=", "7"), Example("0+5=", "5")], after_hash, "exact")
    got = evaluate(policy, Scripted(policy), task, tiny.config(eval_samples=4, eval_pass_k=2), step=3)
    assert tuple(got) == EVALUATION
    assert got["eval_accuracy"] == pytest.approx(3 / 8)
    assert got["eval_greedy"] == pytest.approx(1 / 2)
    assert got["eval_maj_at_k"] == pytest.approx(1 / 2)
    assert got["eval_pass_at_k"] == pytest.approx(((1 - 1 / 6) + (1 - 3 / 6)) / 2)


def test_the_same_step_gives_the_same_figures(policy: Policy) -> None:
    learner = tiny.learner(policy)
    task = make_task(0)._replace(held_out=make_task(0).held_out[:64])
    first, again, later = (evaluate(policy, learner.engine, task, learner.config, step) for step in (1, 1, 2))
    assert first == again
    assert first != later
    assert 0 < first["eval_accuracy"] <= first["eval_pass_at_k"] < 1


def test_a_model_that_is_right_scores_one(policy: Policy) -> None:
    task = Task([], [Example("3+4=", "7")] * 2, lambda text: "7", "exact")
    assert set(evaluate(policy, tiny.learner(policy).engine, task, tiny.config(), 0).values()) == {1.0}
