"""The KL divergence on the tokens of the answers and on the others."""

from __future__ import annotations

import pytest
import tiny
import torch

from mgrpo_kernels import policy_loss
from mgrpo_kernels.train import step as steps
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.step import train_step
from mgrpo_kernels.train.watch.kl_parts import kl_of_tokens, kl_parts

OWN = torch.tensor([[-1.0, -2.0, -0.5, 0.0], [-1.0, -1.0, -3.0, -2.0], [-0.1, -0.2, -0.3, -0.4]])
REF = torch.tensor([[-1.5, -1.0, -0.5, 9.0], [-2.0, -1.0, -1.0, -2.5], [-5.0, -5.0, -5.0, -5.0]])
MASK = torch.tensor([[True, True, True, False], [True] * 4, [True] * 4])
ANSWER = torch.tensor([[False, True, False, False], [False, False, True, True], [False] * 4])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_estimate_is_that_of_the_loss(estimator: str) -> None:
    result = policy_loss(OWN, None, torch.zeros(3), mask=MASK, ref_logprobs=REF, kl_coef=1.0, kl_estimator=estimator)
    torch.testing.assert_close(kl_of_tokens(OWN, REF, estimator)[MASK].sum(), result.metrics["kl_sum"])


def test_parts_are_means_over_their_tokens() -> None:
    """The last response counts for neither: its answer is not in its text."""
    kl = kl_of_tokens(OWN, REF, "k2")
    found = kl_parts(OWN, REF, MASK, ANSWER, "k2")
    assert found["kl_answer"] == pytest.approx(float(kl[0, 1] + kl[1, 2] + kl[1, 3]) / 3)
    assert found["kl_reasoning"] == pytest.approx(float(kl[0, 0] + kl[0, 2] + kl[1, 0] + kl[1, 1]) / 4)


def test_without_answers_there_is_no_figure() -> None:
    assert kl_parts(OWN, REF, MASK, torch.zeros_like(ANSWER), "k3") == {"kl_answer": None, "kl_reasoning": None}
    empty = torch.zeros(0, 4)
    assert kl_parts(empty, empty, empty.bool(), empty.bool(), "k3") == {"kl_answer": None, "kl_reasoning": None}


def test_a_step_measures_both_parts(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = tiny.learner(policy, learning_rate=2e-3)
    seen, real = [], steps.kl_parts

    def spy(*args: torch.Tensor) -> dict[str, float | None]:
        seen.append(args)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(steps, "kl_parts", spy)
    for step in (1, 2):
        line, _ = train_step(learner, learner.task.train[3 * step : 3 * step + 3], step)
    own, ref, mask, answer, estimator = seen[-1]
    assert estimator == "k3"
    assert (answer & ~mask).sum() == 0
    assert answer.sum() == answer.any(-1).sum() > 0  # an answer of the demonstration is one digit
    kl = kl_of_tokens(own, ref, "k3")
    assert line["kl_answer"] == pytest.approx(float(kl[answer].mean()))
    assert line["kl_answer"] > 0
    # All rollouts that train are measured here: together with those without an answer, the parts are the whole.
    assert float(kl[mask].mean()) == pytest.approx(line["kl"], rel=1e-3)


def test_without_a_reference_there_is_none(policy: Policy) -> None:
    learner = tiny.learner(policy, kl_coef=0.0, kl_reference="none")
    line, _ = train_step(learner, learner.task.train[:3], 1)
    assert "kl_answer" not in line
