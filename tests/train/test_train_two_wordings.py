"""Methods that ask a question in two wordings, in a training step: which prompt each rollout answers, and as an answer to which it trains."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

from mgrpo_kernels.train import step as steps
from mgrpo_kernels.train.data import demo
from mgrpo_kernels.train.model.policy import Policy

G = 8
SUMS = [demo.example((1, 2, 3)), demo.example((4, 5)), demo.example((6, 0))]


def asked(policy: Policy, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[list[Any], list[list[int]], Any]:
    """Return the calls of the engine in a step, the prompts that train, and the first one's samples."""
    learner = tiny.learner(policy, rollouts=G, samples_per_step=G, min_votes=1, **changes)
    calls, trained = [], []
    sample, take = learner.engine.sample, steps.take_step

    def spy(prompts: Any, copies: int, **more: Any) -> Any:
        calls.append((prompts, copies, more))
        return sample(prompts, copies, **more)

    def keep(policy: Any, optimizer: Any, batch: Any, *rest: Any) -> Any:
        trained.extend(batch.prompts)
        return take(policy, optimizer, batch, *rest)

    monkeypatch.setattr(learner.engine, "sample", spy)
    monkeypatch.setattr(steps, "take_step", keep)
    _, samples = steps.train_step(learner, SUMS, 1)
    return calls, trained, samples


@pytest.mark.parametrize("method", ["co_rewarding_1", "self_harmony"])
def test_the_policy_answers_both_wordings(policy: Policy, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    calls, trained, samples = asked(policy, monkeypatch, method=method)
    first, second = (policy.encode([getattr(each, name) for each in SUMS]) for name in ("prompt", "paraphrase"))
    assert first != second
    assert [(prompts, copies, more["momentum"]) for prompts, copies, more in calls] == [
        (first, G // 2, None),
        (second, G // 2, None),
    ]
    assert calls[0][2]["generator"] is not calls[1][2]["generator"]
    assert trained == [prompt for a, b in zip(first, second, strict=True) for prompt in [a] * (G // 2) + [b] * (G // 2)]
    assert [each["prompt"] for each in samples] == ["1+2+3="] * 4 + ["3+2+1="] * 4
    assert {each["sampled_by"] for each in samples} == {"policy"}


def test_the_momentum_model_answers_the_second_wording(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, trained, samples = asked(policy, monkeypatch, method="co_rewarding_3")
    first, second = (policy.encode([getattr(each, name) for each in SUMS]) for name in ("prompt", "paraphrase"))
    assert [(prompts, copies, more["momentum"] is None) for prompts, copies, more in calls] == [
        (first, G // 2, True),
        (second, G // 2, False),
    ]
    assert trained == [prompt for prompt in first for _ in range(G // 2)]
    assert [each["prompt"] for each in samples] == ["1+2+3="] * 4 + ["3+2+1="] * 4


def test_a_method_with_one_wording_asks_once(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, _, samples = asked(policy, monkeypatch, method="srt")
    assert [(prompts, copies) for prompts, copies, _ in calls] == [(policy.encode([each.prompt for each in SUMS]), G)]
    assert {each["prompt"] for each in samples} == {"1+2+3="}


def test_a_reward_of_the_user_gets_the_wording_that_was_answered(policy: Policy) -> None:
    learner = tiny.learner(policy, rollouts=4, method="self_harmony", min_votes=1)
    got: list[str] = []

    def reward(prompts: list[str], *_: Any) -> list[float]:
        got.extend(prompts)
        return [float(number % 2) for number in range(len(prompts))]

    learner.task = learner.task._replace(reward=reward)
    steps.train_step(learner, SUMS, 1)
    assert got[:4] == ["1+2+3=", "1+2+3=", "3+2+1=", "3+2+1="]
