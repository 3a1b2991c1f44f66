"""Options of the method and of the rollouts: each one changes what a step does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from mgrpo_kernels import MomentumModel
from mgrpo_kernels.train import step as steps
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.rollout import RolloutEngine, Rollouts
from mgrpo_kernels.train.score import score
from mgrpo_kernels.train.step import Learner, train_step
from mgrpo_kernels.train.update import Batch

G, M = 8, 6  # of 8 rollouts 6 are the policy's
ANSWERS = ["12#3$", "120#3$", "1#3$", "#4$", "77#5$", "#6$"]
SAMPLED = -1.25


class Scripted(RolloutEngine):
    """Gives each prompt the same responses, and keeps what it was asked for."""

    def __init__(self, policy: Policy, own: Sequence[str] = ANSWERS, others: Sequence[str] = ("#4$", "0#4$")) -> None:
        self.policy, self.own, self.others = policy, own, others
        self.calls: list[dict[str, Any]] = []

    def sample(self, prompts: Any, copies: int, *, momentum: MomentumModel | None = None, **options: Any) -> Rollouts:
        self.calls.append({"copies": copies, "momentum": momentum, **options})
        texts = [text for _ in prompts for text in (self.own if momentum is None else self.others)]
        ids = self.policy.encode(texts)
        width = max(map(len, ids))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        mask = torch.arange(width) < torch.tensor([len(row) for row in ids])[:, None]
        return Rollouts(
            tokens, mask, torch.full(tokens.shape, SAMPLED) * mask, torch.ones(len(texts), dtype=torch.bool)
        )


def run(
    policy: Policy, *, engine: Scripted | None = None, learner: Learner | None = None, step: int = 1, **changes: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Take one step with these options; return its metrics and all rollouts of the first prompt."""
    changes = {"samples_per_step": G, **changes}
    learner = tiny.learner(policy, **changes) if learner is None else learner
    learner.engine = Scripted(policy) if engine is None else engine
    return train_step(learner, learner.task.train[:3], step)


def lengths(policy: Policy) -> list[int]:
    return [len(ids) for ids in policy.encode([*ANSWERS, "#4$", "0#4$"])]


def test_min_share_withholds_the_label(policy: Policy) -> None:
    for least, label in ((0.3, "3"), (0.4, None)):  # 3 and 4 have three votes of eight
        line, samples = run(policy, iqr_filter=False, min_share=least)
        assert {sample["label"] for sample in samples} == {label}
        assert (line["reward_mean"] > 0) == (label is not None)
        assert line["distinct_labels"] == (None if label is None else pytest.approx(1 / 3))


def test_k_decides_how_much_is_pruned(policy: Policy) -> None:
    pruned = [run(policy, iqr_k=k)[0]["pruned_fraction"] for k in (0.0, 1e6)]
    assert pruned[0] > 0.0  # below the first quartile
    assert pruned[1] == 0.0


def test_a_large_least_spread_prunes_nothing(policy: Policy) -> None:
    assert run(policy, iqr_k=0.0, iqr_min_spread=1e6)[0]["pruned_fraction"] == 0.0


def test_the_entropy_of_a_trajectory_is_a_mean_or_a_sum(policy: Policy) -> None:
    mean, total = (
        [sample["entropy"] for sample in run(policy, entropy_reduction=how, learning_rate=1e-12)[1]]
        for how in ("mean", "sum")
    )
    assert total == pytest.approx(
        [value * length for value, length in zip(mean, lengths(policy), strict=True)], rel=1e-3
    )


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_sampling_and_scoring_are_at_the_temperature(policy: Policy, temperature: float) -> None:
    engine = Scripted(policy)
    learner = tiny.learner(policy, temperature=temperature, samples_per_step=G)
    prompt = policy.encode([learner.task.train[0].prompt])[0]
    rollouts = engine.sample([prompt], M, temperature=temperature)
    found = score(policy, [prompt] * M, rollouts.tokens, rollouts.mask, temperature=temperature, budget=10**6)
    assert found.entropy is not None
    want = found.entropy.sum(-1) / rollouts.mask.sum(-1)
    _, samples = run(policy, engine=engine, learner=learner)
    assert [sample["entropy"] for sample in samples[:M]] == pytest.approx(want.tolist(), rel=1e-4)
    assert {call["temperature"] for call in engine.calls} == {temperature}


def test_random_numbers_are_of_the_step_and_the_model_that_samples(policy: Policy) -> None:
    seeds = []
    for seed in (0, 1):
        for step in (1, 2):
            engine = Scripted(policy)
            run(policy, engine=engine, step=step, seed=seed)
            assert [call["momentum"] is None for call in engine.calls] == [True, False]
            assert [call["copies"] for call in engine.calls] == [M, G - M]
            seeds += [call["generator"].initial_seed() for call in engine.calls]
    assert len(set(seeds)) == len(seeds) == 8


def test_answers_are_compared_as_the_task_says(policy: Policy) -> None:
    learner = tiny.learner(policy, iqr_filter=False, samples_per_step=G)
    learner.task = learner.task._replace(equivalence=lambda a, b: {a, b} <= {"4", "5", "6"} or a == b)
    line, samples = run(policy, learner=learner)
    assert {sample["label"] for sample in samples} == {"4"}  # five of eight, as 5 and 6 are the same answer
    assert line["vote_share"] == pytest.approx(5 / 8)


def batches(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Return the list into which every step puts what it trains on."""
    seen: list[Batch] = []
    real = steps.take_step

    def taken(policy: Policy, optimizer: Any, batch: Batch, *rest: Any) -> dict[str, Any]:
        seen.append(batch)
        return real(policy, optimizer, batch, *rest)

    monkeypatch.setattr(steps, "take_step", taken)
    return seen


@pytest.mark.parametrize("corrected", [False, True])
def test_the_correction_takes_what_the_sampler_said(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, corrected: bool
) -> None:
    seen = batches(monkeypatch)
    run(policy, behaviour_correction=corrected, iqr_filter=False)
    (batch,) = seen
    if not corrected:
        assert batch.behaviour_logprobs is None
        return
    assert batch.behaviour_logprobs is not None
    assert torch.equal(batch.behaviour_logprobs, SAMPLED * batch.mask)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_only_the_tokens_with_the_highest_entropies_have_a_policy_loss(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    seen = batches(monkeypatch)
    run(policy, top_entropy_share=share, iqr_filter=False)
    (batch,) = seen
    if share == 1.0:
        assert batch.advantages.dim() == 1
        return
    assert batch.advantages.shape == batch.mask.shape
    counted = batch.advantages.abs().amax(1) > 0
    assert 0 < (batch.advantages != 0).sum() <= share * batch.mask.sum() + 1
    assert not batch.advantages[~batch.mask].any()
    assert counted.any()


def test_the_scale_of_the_advantages_is_an_option(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = batches(monkeypatch)
    for scale in ("std", "none", "mean"):
        run(policy, advantage_scale=scale, iqr_filter=False)
    std, none, mean = (batch.advantages for batch in seen)
    assert not torch.allclose(std, none)
    assert not torch.allclose(mean, none)
    assert torch.equal(mean.sign(), none.sign())


def lagging(learner: Learner) -> dict[str, Tensor]:
    """Let the momentum model differ from the policy; return its weights."""
    assert learner.momentum is not None
    for value in learner.momentum.ema.values():
        value.mul_(0.5)
    return tiny.weights(learner.momentum)


def test_the_momentum_model_moves_once_towards_the_weights_after_the_step(policy: Policy) -> None:
    learner = tiny.learner(policy, decay=0.9, samples_per_step=G)
    before = lagging(learner)
    line, _ = run(policy, learner=learner)
    assert learner.momentum is not None
    apart, size = 0.0, 0.0
    for name, parameter in policy.model.named_parameters():
        average = learner.momentum.ema[name]
        torch.testing.assert_close(average, 0.9 * before[name] + 0.1 * parameter.detach())
        apart += float((parameter.detach() - average).double().square().sum())
        size += float(parameter.detach().double().square().sum())
    assert line["momentum_distance"] == pytest.approx((apart / size) ** 0.5, rel=1e-4)


def test_the_decay_follows_a_cosine() -> None:
    config = tiny.config(steps=101, decay=0.9, decay_end=0.99)
    assert config.method.decay_at(26, 101) == pytest.approx(0.9 + 0.09 * (1 - 2**-0.5) / 2)
    assert config.method.decay_at(101, 101) == 0.99


def test_metrics_are_of_what_they_say(policy: Policy) -> None:
    learner = tiny.learner(policy, iqr_k=0.0, samples_per_step=G, prompts_per_step=1)
    lagging(learner)
    texts = ["12#3$", "120#3$", "1#3$", "#4$", "77#5$", ""]
    learner.engine = Scripted(policy, own=texts)
    line, samples = train_step(learner, learner.task.train[:1], 1)  # all rollouts of the step are shown
    pruned = [sample["pruned"] for sample in samples]
    assert any(pruned)
    assert not pruned[5]  # an empty response is not pruned: there is nothing to prune
    assert line["pruned_fraction"] == sum(pruned) / G
    tokens = [len(ids) for ids in policy.encode(texts)]
    sums = [sample["entropy"] * length for sample, length in zip(samples[:M], tokens, strict=True) if length]
    assert line["entropy"] == pytest.approx(sum(sums) / sum(tokens), rel=1e-5)  # of the policy's tokens alone
    assert line["top_answer_share"] == pytest.approx(3 / 7)
