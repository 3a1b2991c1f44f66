"""A whole step, and what it makes of groups in which nothing can be learnt."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from mgrpo_kernels import MomentumModel, group_advantages, trajectory_entropy
from mgrpo_kernels.method import METHODS, outcome, pruning
from mgrpo_kernels.train import step as steps
from mgrpo_kernels.train.data.demo import after_hash
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.rollout import RolloutEngine, Rollouts
from mgrpo_kernels.train.step import Learner, train_step
from mgrpo_kernels.train.watch.metrics import EVALUATION, KEYS, metrics_line

G, M = 8, 6  # of 8 rollouts 6 are the policy's


def scripted(policy: Policy, responses: Callable[[int, bool], list[str]]) -> Any:
    """Return an engine that says what it is told, padded as the real one pads; without '$' a response is cut."""

    class Scripted(RolloutEngine):
        def sample(
            self, prompts: Sequence[Sequence[int]], copies: int, *, momentum: MomentumModel | None, **_: Any
        ) -> Rollouts:
            texts = [
                text for prompt in range(len(prompts)) for text in responses(prompt, momentum is not None)[:copies]
            ]
            ids = policy.encode(texts)
            width = max(1, *map(len, ids))
            tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids])
            mask = torch.arange(width) < torch.tensor([len(row) for row in ids])[:, None]
            finished = torch.tensor([text.endswith("$") for text in texts])
            return Rollouts(tokens, mask, torch.full(tokens.shape, -1.0) * mask, finished)

    return Scripted()


def run(learner: Learner, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Tensor]]:
    """Take one step; return its line, its samples, and how far each weight moved."""
    learner.config = tiny.config(**changes)
    before = tiny.weights(learner.policy)
    values, samples = train_step(learner, learner.task.train[:3], 1)
    line = metrics_line(values, None)
    assert all(value is None or not isinstance(value, float) or math.isfinite(value) for value in line.values()), line
    return line, samples, {name: value - before[name] for name, value in tiny.weights(learner.policy).items()}


def moved(change: dict[str, Tensor]) -> bool:
    assert all(torch.isfinite(value).all() for value in change.values())
    return any(bool((value != 0).any()) for value in change.values())


def test_a_step_fills_every_key(policy: Policy) -> None:
    line, samples, change = run(tiny.learner(policy))
    assert list(line) == [key for key in KEYS if key not in EVALUATION]
    assert [key for key, value in line.items() if value is None] == [
        "masked_fraction",
        "teacher_refreshes",
        "teacher_gate",
        "time_sync",
        "guard",
        "guard_signs",
    ]
    assert moved(change)
    assert 0 < line["momentum_distance"] < 0.1
    assert line["behaviour_mismatch"] < 1e-4
    assert line["clip_fraction"] == 0.0  # one step a batch: the ratio is 1
    assert line["kl"] == pytest.approx(0, abs=1e-6)  # the reference is the model itself at the first step
    assert {sample["sampled_by"] for sample in samples} == {"policy", "momentum"}


def test_momentum_model_moves_once_by_its_decay(policy: Policy) -> None:
    learner = tiny.learner(policy)
    assert learner.momentum is not None
    before = tiny.weights(policy)
    run(learner, decay=0.9)
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(learner.momentum.ema[name], 0.9 * before[name] + 0.1 * parameter.detach())


REFUSED = {("vote", name) for name, method in METHODS.items() if method.reads == "nothing"} | {
    ("penalise", name) for name, method in METHODS.items() if method.lowest < 0 or method.own_advantages
}
"""A filter scope that would have no effect, or a reward that a pruned rollout's 0 would be above."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["both", "vote", "penalise"])
def test_every_method_in_every_scope(policy: Policy, method: str, scope: str) -> None:
    # With seed 2, every method has two different rewards.
    changes = {"method": method, "filter_scope": scope, "iqr_filter": True, "min_votes": 1, "seed": 2}
    if (scope, method) in REFUSED:
        with pytest.raises(UsageError, match="filter_scope: expected"):
            tiny.config(**changes)
        return
    line, _, change = run(tiny.learner(policy, **changes), **changes)
    assert moved(change)
    assert (line["momentum_distance"] is None) == (METHODS[method].momentum_share == 0)


@pytest.mark.parametrize("reference", ["base", "momentum", "none"])
def test_kl_reference(policy: Policy, reference: str) -> None:
    learner = tiny.learner(policy, kl_reference=reference)
    run(learner, kl_reference=reference)
    line, _, _ = run(learner, kl_reference=reference)
    assert (line["kl"] is None) == (reference == "none")
    assert reference == "none" or line["kl"] > 0


ANSWERS = ["12#3$", "12#3$", "1#3$", "#4$", "#5$", "#6$", "#3$", "#4$"]


def test_vote_reward_and_advantage_by_hand(policy: Policy) -> None:
    learner = tiny.learner(policy, iqr_filter=False, samples_per_step=G)
    learner.engine = scripted(policy, lambda prompt, momentum: ["#4$", "#4$"] if momentum else ANSWERS)
    line, samples, _ = run(learner, iqr_filter=False, samples_per_step=G)
    rewards = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0])  # 3: three votes, as many as 4 has, but it came first
    want = group_advantages(rewards, G, mask=torch.arange(G) < M)
    assert [sample["label"] for sample in samples] == ["3"] * G
    assert [sample["reward"] for sample in samples] == rewards.tolist()
    assert [sample["advantage"] for sample in samples] == pytest.approx(want.tolist())
    assert [sample["sampled_by"] for sample in samples] == ["policy"] * M + ["momentum"] * 2
    assert line["vote_share"] == pytest.approx(3 / 8)
    assert line["reward_mean"] == pytest.approx(0.5)
    assert line["distinct_labels"] == pytest.approx(1 / 3)
    assert line["top_answer_share"] == pytest.approx(3 / 8)


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.75])
def test_the_answers_tokens_have_their_weight_in_the_loss(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, weight: float
) -> None:
    changes = {"method": "soft_vote", "answer_weight": weight}
    learner = tiny.learner(policy, **changes)
    learner.engine = scripted(policy, lambda prompt, momentum: ANSWERS)
    caught: list[Any] = []
    monkeypatch.setattr(steps, "take_step", lambda policy, optimizer, batch, *_: caught.append(batch) or {})
    line, _, _ = run(learner, **changes)
    shares = (
        torch.tensor(
            [text.count("#3") * 4 + text.count("#4") * 2 + text.count("#5") + text.count("#6") for text in ANSWERS]
        )
        / 8
    )
    advantages = group_advantages(shares, G).repeat(3)
    for row, (text, advantage) in enumerate(zip(ANSWERS * 3, advantages.tolist(), strict=True)):
        answer = text.index("#") + 1
        want = [advantage * (weight if i == answer else 1.0) for i in range(len(text))]
        assert caught[0].advantages[row, : len(text)].tolist() == pytest.approx(want)
    assert line["token_weight"] == pytest.approx(sum(1 - (1 - weight) / len(text) for text in ANSWERS) / 8)


def prune_first(monkeypatch: pytest.MonkeyPatch, pruned: int) -> None:
    """Let the filter prune the first rollouts of each prompt."""
    real = pruning.iqr_filter

    def filtered(entropy: Tensor, groups: Tensor, **options: Any) -> Any:
        return real(entropy, groups, **options)._replace(keep=torch.arange(len(entropy)) % G >= pruned)

    monkeypatch.setattr(pruning, "iqr_filter", filtered)


@pytest.mark.parametrize(
    ("scope", "rewards", "trains"),
    [("both", [0, 0, 0, 1, 0, 0], 3), ("vote", [0, 0, 0, 1, 0, 0], 6), ("penalise", [0, 0, 0, 1, 0, 0], 6)],
)
def test_pruned_rollouts(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, scope: str, rewards: list[int], trains: int
) -> None:
    prune_first(monkeypatch, 3)
    changes = {"filter_scope": scope, "samples_per_step": G}
    learner = tiny.learner(policy, **changes)
    learner.engine = scripted(policy, lambda prompt, momentum: ["#4$", "#4$"] if momentum else ANSWERS)
    line, samples, _ = run(learner, **changes)
    assert line["pruned_fraction"] == pytest.approx(3 / 8)
    assert {sample["label"] for sample in samples} == {"4"}  # the three votes for 3 are pruned
    assert [sample["reward"] for sample in samples][:M] == rewards
    trained = [sample["advantage"] != 0 for sample in samples]
    assert sum(trained) == trains
    assert not any(trained[M:])


def test_penalise_takes_the_reward_that_vote_gives(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    prune_first(monkeypatch, 1)
    same = ["#4$", "#4$", "#5$", "#6$", "#7$", "#8$"]
    got = {}
    for scope in ("vote", "penalise"):
        changes = {"filter_scope": scope, "samples_per_step": G}
        learner = tiny.learner(policy, **changes)
        learner.engine = scripted(policy, lambda prompt, momentum: ["#4$", "#4$"] if momentum else same)
        got[scope] = [sample["reward"] for sample in run(learner, **changes)[1]][:3]
    assert got == {"vote": [1, 1, 0], "penalise": [0, 1, 0]}


def test_all_filtered_leaves_the_weights_and_goes_on(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    prune_first(monkeypatch, G)
    line, _, change = run(tiny.learner(policy))
    assert not moved(change)
    assert (line["loss"], line["grad_norm"], line["reward_mean"], line["kl"]) == (None, None, None, None)
    assert (line["pruned_fraction"], line["vote_share"], line["distinct_labels"]) == (1.0, 0.0, None)
    monkeypatch.undo()
    assert moved(run(tiny.learner(policy))[2])


@pytest.mark.parametrize(
    "responses",
    [["12#3$"] * G, ["7$"] * G, ["12#34$"] * G, ["1234"] * G, ["$"] * G],
    ids=["all tied", "no mark", "no digit", "all cut", "only the end"],
)
@pytest.mark.parametrize("truncated", ["keep", "mask"])
def test_nothing_to_learn(policy: Policy, responses: list[str], truncated: str) -> None:
    changes = {"kl_coef": 0.0, "truncated": truncated}
    learner = tiny.learner(policy, **changes)
    learner.engine = scripted(policy, lambda prompt, momentum: responses)
    line, _, change = run(learner, **changes)
    assert not moved(change)  # no advantage, no KL term: a gradient of exactly 0
    assert line["response_tokens"] == len(responses[0])
    assert line["groups_with_signal"] == 0.0
    answered = responses[0] == "12#3$"
    assert line["unparsed_fraction"] == (0.0 if answered else 1.0)
    assert learner.warned_of_answers == (not answered)
    assert (line["label_accuracy"] is None, line["distinct_labels"] is None) == (not answered, not answered)
    assert line["truncated_fraction"] == (0.0 if responses[0].endswith("$") else 1.0)
    real = tiny.learner(policy)
    assert moved(run(real)[2])


@pytest.mark.parametrize("empty", [range(1), range(5), range(8)])
def test_empty_responses(policy: Policy, empty: range) -> None:
    texts = ["" if place in empty else ANSWERS[place] for place in range(G)]
    learner = tiny.learner(policy, samples_per_step=G)
    learner.engine = scripted(policy, lambda prompt, momentum: texts[M:] if momentum else texts[:M])
    line, samples, _ = run(learner, samples_per_step=G)
    for place in empty:
        assert samples[place]["advantage"] == 0
        assert not samples[place]["pruned"]
        assert math.isnan(samples[place]["entropy"])
    assert (line["entropy"] is None) == (len(empty) >= M)


def test_truncated_responses_vote_and_train_or_not(policy: Policy) -> None:
    texts = ["#5", "#3$", "#3$", "#4$", "#6$", "#5"]  # what reaches the end of a cut response is no answer
    for truncated, trains in (("keep", 6), ("mask", 4)):
        changes = {"truncated": truncated, "samples_per_step": G, "iqr_filter": False}
        learner = tiny.learner(policy, **changes)
        learner.engine = scripted(policy, lambda prompt, momentum: ["#7$", "#8$"] if momentum else texts)
        _, samples, _ = run(learner, **changes)
        assert {sample["label"] for sample in samples} == {"3"}
        assert sum(sample["advantage"] != 0 for sample in samples) == trains
        assert (samples[0]["advantage"] == 0) == (truncated == "mask")


def test_every_trajectory_is_scored_by_its_sampler(policy: Policy) -> None:
    learner = tiny.learner(policy)
    assert learner.momentum is not None
    for value in learner.momentum.ema.values():
        value.mul_(0.5)
    seen = steps.roll_out(learner, learner.task.train[:3], 1)
    stats = steps.score_by_sampler(learner, seen)
    torch.testing.assert_close(stats.logprob, seen.rollouts.logprobs, atol=1e-4, rtol=0)
    entropy = trajectory_entropy(stats.entropy, mask=seen.rollouts.mask)
    assert entropy[~seen.by_policy].mean() > entropy[seen.by_policy].mean()


def lag(learner: Learner) -> None:
    """Let the momentum model differ from the policy, and be less sure."""
    assert learner.momentum is not None
    for value in learner.momentum.ema.values():
        value.mul_(0.5)


@pytest.mark.parametrize(("scored_by", "weight"), [("sampler", "momentum"), ("policy", "policy")])
def test_who_scores_the_momentum_rollouts(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, scored_by: str, weight: str
) -> None:
    changes = {"momentum_scored_by": scored_by}
    learner, given = tiny.learner(policy, **changes), []
    lag(learner)
    real = pruning.iqr_filter
    monkeypatch.setattr(
        pruning, "iqr_filter", lambda entropy, *a, **k: given.append(entropy.clone()) or real(entropy, *a, **k)
    )
    seen = steps.roll_out(learner, learner.task.train[:3], 1)
    own = score_all(policy, seen, learner)
    assert learner.momentum is not None
    with learner.momentum.swapped_into(policy.model):
        others = score_all(policy, seen, learner)
    line, _, _ = run(learner, **changes)  # samples the same
    theirs = own if weight == "policy" else others
    torch.testing.assert_close(given[0][seen.by_policy], own[seen.by_policy])
    torch.testing.assert_close(given[0][~seen.by_policy], theirs[~seen.by_policy])
    assert not torch.allclose(own[~seen.by_policy], others[~seen.by_policy], atol=1e-3)
    assert line["behaviour_mismatch"] < 1e-4  # of log-probs under the sampler, whoever gives the entropy


def score_all(policy: Policy, seen: Any, learner: Learner) -> Tensor:
    stats = steps.score(
        policy, seen.prompts, seen.rollouts.tokens, seen.rollouts.mask, **steps.scoring(learner.config.rollout)
    )
    return trajectory_entropy(stats.entropy, mask=seen.rollouts.mask)


@pytest.mark.parametrize("trained", [False, True])
def test_momentum_rollouts_train_with_their_weight(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, trained: bool
) -> None:
    changes = {"train_momentum_rollouts": trained, "iqr_filter": False, "kl_coef": 0.0}
    learner, batches = tiny.learner(policy, **changes), []
    lag(learner)
    real = steps.take_step
    monkeypatch.setattr(
        steps,
        "take_step",
        lambda policy, optimizer, batch, *rest: batches.append(batch) or real(policy, optimizer, batch, *rest),
    )
    _, _, change = run(learner, **changes)
    assert moved(change)
    (batch,) = batches
    assert len(batch.prompts) == 3 * (G if trained else M)
    if not trained:
        assert batch.behaviour_logprobs is None
        return
    off = (batch.old_logprobs - batch.behaviour_logprobs)[batch.mask.any(-1)].abs().sum(-1).view(3, G)
    assert (off[:, :M] == 0).all()  # the policy's own: weight exactly 1
    assert (off[:, M:] > 0.1).all()


def test_ttrl_votes_with_all_and_trains_half(policy: Policy) -> None:
    learner = tiny.learner(policy, method="ttrl")
    seen = steps.roll_out(learner, learner.task.train[:3], 1)
    selection = steps.select_rollouts(learner, seen, steps.score_by_sampler(learner, seen), 1)
    assert selection.voters.all()
    assert selection.trains.view(3, G).tolist() == [[True] * 4 + [False] * 4] * 3


def test_co_rewarding_takes_its_labels_from_the_momentum_model(policy: Policy) -> None:
    learner = tiny.learner(policy, method="co_rewarding", samples_per_step=G)
    learner.engine = scripted(
        policy, lambda prompt, momentum: ["#7$", "#8$", "#8$", "#9$"] if momentum else ["#1$"] * 3 + ["#8$"]
    )
    _, samples, _ = run(learner, method="co_rewarding", samples_per_step=G)
    assert {sample["label"] for sample in samples} == {"8"}


def test_decay_schedule() -> None:
    config = tiny.config(steps=101, decay=0.9, decay_end=0.99)
    assert [config.method.decay_at(step, 101) for step in (1, 51, 101)] == pytest.approx([0.9, 0.945, 0.99])
    assert tiny.config().method.decay_at(3, 4) == 0.99


def test_a_step_that_is_not_finite_changes_nothing(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "group_advantages", lambda rewards, *_, **__: torch.full_like(rewards, torch.nan))
    learner = tiny.learner(policy)
    assert learner.momentum is not None
    before, average = tiny.weights(policy), tiny.weights(learner.momentum)
    with pytest.raises(FloatingPointError, match="update: expected a finite loss"):
        train_step(learner, learner.task.train[:3], 1)
    assert all(torch.equal(before[name], value) for name, value in tiny.weights(policy).items())
    assert all(torch.equal(average[name], value) for name, value in tiny.weights(learner.momentum).items())


def test_bfloat16_products_keep_float32_weights(base: Any) -> None:
    from mgrpo_kernels.train.model.policy import load_policy

    policy = load_policy(str(base), torch.device("cpu"), torch.bfloat16)
    line, _, change = run(tiny.learner(policy, dtype="bfloat16"), dtype="bfloat16")
    assert moved(change)
    assert {value.dtype for value in change.values()} == {torch.float32}
    assert 1e-6 < line["behaviour_mismatch"] < 0.1


def test_demo_answers() -> None:
    assert [after_hash(text) for text in ("307#7", "#7", "307", "#", "#77", "#+", "1#2#3")] == [
        "7",
        "7",
        None,
        None,
        None,
        None,
        None,
    ]


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.config().run.seed = 1  # type: ignore[misc]
