"""select() on groups whose right values can be read off."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mgrpo_kernels import group_advantages
from mgrpo_kernels.method import METHODS, Method, MethodOptions, Outcome, Selection, Signals, select

# A prompt with six rollouts, and one with three.
ANSWERS: list[str | None] = ["3", "3", "4", "4", None, "3"] + ["7", "8", "8"]
OFFSETS = torch.tensor([0, 6, 9])
MOMENTUM = torch.tensor([False, False, False, False, True, True] + [False, False, True])
LENGTHS = [2, 2, 2, 2, 2, 1] + [2, 2, 0]
LEVELS = torch.tensor([0.1, 1.0, 1.1, 1.2, 1.3, 1.4] + [1.0, 1.0, 9.0])
MASK = torch.arange(2) < torch.tensor(LENGTHS)[:, None]
ENTROPY = LEVELS[:, None].expand(-1, 2).contiguous()
FULL = {"entropy": ENTROPY, "by_momentum": MOMENTUM}


def chosen(groups: Any = OFFSETS, answers: Any = ANSWERS, mask: Tensor = MASK, **more: Any) -> Selection:
    inputs = {name: more.pop(name) for name in list(more) if name not in MethodOptions.__dataclass_fields__}
    options = MethodOptions(**{"equivalence": "exact", "min_votes": 1, **more})
    return select(mask, answers, groups, options, **{**FULL, **inputs})


def test_the_first_rollout_is_pruned_and_neither_votes_nor_trains() -> None:
    got = chosen()
    assert got.nonempty.tolist() == [True] * 8 + [False]
    assert got.survives.tolist() == [False] + [True] * 7 + [False]
    assert got.voters.tolist() == got.survives.tolist()
    assert got.vote is not None
    assert got.vote.labels == ["3", "7"]  # two votes each in the first; 8's second vote is an empty response's
    assert got.rewards.tolist() == [1, 1, 0, 0, 0, 1, 1, 0, 0]
    assert got.trains.tolist() == [False, True, True, True, False, False, True, True, False]
    assert torch.equal(got.advantages, group_advantages(got.rewards, OFFSETS, mask=got.trains))


@pytest.mark.parametrize("scope", ["vote", "penalise"])
def test_pruned_rollouts_train_in_the_other_scopes(scope: str) -> None:
    got = chosen(filter_scope=scope)
    assert got.trains.tolist() == [True, True, True, True, False, False, True, True, False]
    assert got.rewards[0] == (1 if scope == "vote" else 0)
    assert not got.voters[0]


def test_momentum_rollouts_train_where_asked_for() -> None:
    assert chosen(train_momentum_rollouts=True).trains.tolist() == [False] + [True] * 7 + [False]


def test_only_the_momentum_model_votes_in_co_rewarding() -> None:
    got = chosen(method="co_rewarding", answers=["3"] * 4 + ["5", "5"] + ["7"] * 3)
    assert got.vote is not None
    assert got.vote.labels == ["5", None]  # the second's only momentum rollout is empty
    assert got.voters.tolist() == [False] * 4 + [True] * 2 + [False] * 3


def test_who_sampled_is_read_for_each_rollout_wherever_it_is() -> None:
    got = chosen(by_momentum=torch.tensor([False, True, False, False, False, False, True, False, False]))
    assert got.trains.tolist() == [False, False, True, True, True, True, False, True, False]


def test_a_momentum_rollout_that_is_pruned_does_not_vote_in_co_rewarding() -> None:
    first = torch.arange(9) % 6 < 2  # the first of these is pruned, and an empty one is not among them
    got = chosen(method="co_rewarding", iqr_filter=True, by_momentum=first, answers=["9", "5"] + ["3"] * 4 + ["7"] * 3)
    assert got.voters.tolist() == [False, True, False, False, False, False, True, True, False]
    assert got.vote is not None
    assert got.vote.labels == ["5", "7"]


def test_ttrl_trains_on_the_first_half_of_the_policys_but_on_two_at_least() -> None:
    got = chosen(groups=9, method="ttrl", by_momentum=None)
    assert got.trains.tolist() == [True] * 4 + [False] * 5
    assert got.voters.tolist() == [True] * 8 + [False]
    assert chosen(method="ttrl").trains.tolist() == [True, True, False, False, False, False, True, True, False]


def test_a_rollout_that_may_not_train_still_votes() -> None:
    got = chosen(may_train=torch.arange(9) != 1)
    assert got.voters[1]
    assert not got.trains[1]
    assert torch.equal(got.advantages, group_advantages(got.rewards, OFFSETS, mask=got.trains))


def test_options_of_the_vote_and_of_the_filter() -> None:
    assert chosen(min_share=0.6).vote.labels == [None, None]  # type: ignore[union-attr]
    assert chosen(iqr_k=10.0).survives.tolist() == [True] * 8 + [False]
    assert chosen(iqr_min_spread=1.0).survives.tolist() == [True] * 8 + [False]
    assert chosen(iqr_filter=False, entropy=None).survives.tolist() == [True] * 8 + [False]
    summed = chosen(entropy_reduction="sum")
    assert summed.entropy is not None
    assert torch.equal(summed.entropy[:8], LEVELS[:8] * torch.tensor(LENGTHS[:8]))


def test_given_rewards_take_the_place_of_the_vote() -> None:
    given = torch.tensor([5.0, -1, 2, math.nan, 0, 0, 1, 2, 3])
    got = chosen(rewards=given)
    assert got.vote is None
    assert got.trains.tolist() == [False, True, True, False, False, False, True, True, False]
    assert torch.equal(got.advantages, group_advantages(given.nan_to_num(), OFFSETS, mask=got.trains))
    assert "vote_share" not in got.metrics()


def test_metrics_by_hand() -> None:
    got = chosen(gold=["3"] * 6 + [None] * 3)
    assert got.label_correct[0] == 1
    assert got.label_correct[1].isnan()
    assert got.metrics() == {
        "reward_mean": pytest.approx(2 / 5),
        "training_fraction": pytest.approx(5 / 9),
        "pruned_fraction": pytest.approx(1 / 9),  # the empty response is not pruned
        "gold_fraction": 0.0,
        "token_weight": 1.0,
        "label_accuracy": 1.0,
        "groups_with_signal": 1.0,
        "vote_share": pytest.approx(1 / 2),
        "vote_share_of_all": pytest.approx((2 / 5 + 1 / 2) / 2),  # a voter of the first has no answer
        "labelled_fraction": 1.0,
        "distinct_labels": 1.0,
        "distinct_answers": 2.0,
    }
    assert got.metrics(prompts=1)["distinct_labels"] == 2.0
    assert chosen(answers=[None] * 6 + ["7"] * 3).metrics()["labelled_fraction"] == 0.5
    assert chosen(answers=[None] * 6 + ["7"] * 3).metrics()["distinct_labels"] == 0.5
    nothing = chosen(answers=[None] * 9, gold=["3"] * 6 + ["7"] * 3).metrics()
    assert nothing["labelled_fraction"] == nothing["vote_share_of_all"] == nothing["groups_with_signal"] == 0.0
    assert nothing["label_accuracy"] is nothing["distinct_labels"] is nothing["distinct_answers"] is None
    assert chosen()._replace(trains=torch.zeros(9, dtype=torch.bool)).metrics()["reward_mean"] is None


def test_a_single_vote_gives_no_label_and_those_without_an_answer_count() -> None:
    few = chosen(answers=["1", "2", "3", "3", None, None] + [None, "7", None], min_votes=2, iqr_filter=False)
    assert few.vote is not None
    assert few.vote.labels == ["3", None]
    assert few.share_of_all.tolist() == pytest.approx([2 / 6, 1 / 2])
    assert few.distinct_answers.tolist() == [3, 1]
    assert few.has_signal.tolist() == [True, False]
    assert chosen(answers=["1", "2", "3", "3", None, None] + ["7"] * 3, min_share=0.41).vote.labels[0] is None  # type: ignore[union-attr]


def test_it_changes_none_of_its_arguments() -> None:
    before = [each.clone() for each in (MASK, ENTROPY, MOMENTUM, OFFSETS)]
    chosen(filter_scope="penalise")
    assert all(torch.equal(a, b) for a, b in zip(before, (MASK, ENTROPY, MOMENTUM, OFFSETS), strict=True))


def test_no_rollouts_at_all() -> None:
    got = select(MASK[:0], [], torch.tensor([0]), MethodOptions(), entropy=ENTROPY[:0])
    assert got.advantages.shape == (0,)
    assert set(got.metrics().values()) == {None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entropy": None}, "entropy: expected a value, which the IQR filter requires, got None"),
        ({"method": "rent", "entropy": None}, "entropy: expected a value, which method rent requires, got None"),
        ({"method": "intuitor"}, "self_certainty: expected a value, which method intuitor requires, got None"),
        ({"method": "gold"}, "gold: expected a value, which method gold requires, got None"),
        (
            {"method": "gold", "gold": ["3"] * 8 + [None]},
            "gold: expected a true answer for every rollout with method gold, got None at 8",
        ),
        ({"method": "random"}, "generator: expected a value, which method random requires, got None"),
        ({"answers": ANSWERS[:8]}, "answers: expected one for each of the 9 rollouts, got 8"),
        ({"by_momentum": MOMENTUM[:8]}, "by_momentum: expected shape"),
        ({"entropy": ENTROPY[:, :1]}, "entropy: expected shape"),
        ({"answer_weight": 0.5}, "answer_tokens: expected a value, which answer_weight 0.5 requires, got None"),
        ({"answer_weight": 0.5, "answer_tokens": MASK[:, :1]}, "answer_tokens: expected shape"),
        ({"groups": 2}, "groups: expected a group size >= 1 that divides the 9 rollouts"),
    ],
)
def test_what_is_missing_or_of_another_size_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chosen(**changes)


KNOWN: list[Any] = ["4"] * 6 + [None] * 3


def test_a_prompt_with_a_true_answer_is_rewarded_by_it_and_the_others_by_their_vote() -> None:
    got = chosen(gold=KNOWN, gold_labels=True)
    assert got.rewards.tolist() == [0, 0, 1, 1, 0, 0, 1, 0, 0]
    assert got.by_gold.tolist() == [True, False]
    assert got.vote is not None
    assert got.vote.labels == ["3", "7"]  # the vote itself, and how right it is, are still reported
    assert got.label_correct[0] == 0
    assert got.metrics()["gold_fraction"] == 0.5
    assert torch.equal(got.advantages, group_advantages(got.rewards, OFFSETS, mask=got.trains))
    assert chosen(gold=KNOWN).rewards.tolist() == [1, 1, 0, 0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("method", ["soft_vote", "empo", "rent", "co_rewarding"])
def test_true_answers_replace_every_kind_of_reward(method: str) -> None:
    golden, voted = chosen(method=method, gold=KNOWN, gold_labels=True), chosen(method=method)
    assert golden.rewards[:6].tolist() == [0, 0, 1, 1, 0, 0]
    assert torch.equal(golden.rewards[6:], voted.rewards[6:])


def test_a_share_of_given_rewards_is_of_a_sum_with_the_true_answers() -> None:
    got = chosen(gold=KNOWN, gold_labels=True, rewards=torch.full((9,), 2.0), reward_share=0.25)
    assert got.rewards.tolist() == [0.5, 0.5, 1.25, 1.25, 0.5, 0.5, 1.25, 0.5, 0.5]


def test_rewards_that_are_given_alone_are_not_by_true_answers() -> None:
    got = chosen(gold=KNOWN, gold_labels=True, rewards=torch.arange(9.0))
    assert got.rewards.tolist() == list(range(9))
    assert got.metrics()["gold_fraction"] == 0.0


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.75])
def test_the_answers_tokens_have_their_weight_unless_the_true_answer_is_the_reward(weight: float) -> None:
    spans = torch.tensor([[False, True]] * 3 + [[True, True]] * 6)
    got = chosen(answer_weight=weight, answer_tokens=spans, gold=[None] * 6 + ["7"] * 3, gold_labels=True)
    want = torch.where(spans & (torch.arange(9) < 6)[:, None], weight, 1.0) * got.advantages[:, None]
    assert got.token_advantages is not None
    assert torch.equal(got.token_advantages, torch.where(MASK & got.trains[:, None], want, 0.0))
    assert got.token_weight.tolist() == pytest.approx([(1 + weight) / 2] * 3 + [weight] * 3 + [1, 1, 1])
    trained = got.token_weight[got.trains]
    assert got.metrics()["token_weight"] == pytest.approx(float(trained.mean()))


def test_om_grpo_takes_the_answer_out_of_the_gradient_unless_told_otherwise() -> None:
    spans = torch.ones(9, 2, dtype=torch.bool)
    assert not chosen(method="om_grpo", answer_tokens=spans).has_signal.any()
    assert chosen(method="om_grpo", answer_weight=1.0).token_advantages is None
    assert torch.equal(chosen(method="om_grpo", answer_tokens=spans).rewards, chosen(method="soft_vote").rewards)


def test_a_method_may_return_more_than_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Signals] = []

    def method(signals: Signals) -> Outcome:
        seen.append(signals)
        return Outcome(
            rewards=torch.full((9,), -2.0),
            advantages=torch.arange(9.0),
            token_weights=torch.tensor([[0.5, 2.0]]).expand(9, 2),
            token_bonus=torch.tensor([[10.0, 20.0]]).expand(9, 2),
            trains=torch.arange(9) != 2,
        )

    monkeypatch.setitem(METHODS, "own", Method(method, "test", own_advantages=True, needs_entropy=True))  # type: ignore[misc]
    got = chosen(method="own", gold=[None] * 6 + ["8"] * 3, gold_labels=True, iqr_filter=True)
    assert got.trains.tolist() == [False, True, False, True, False, False, True, True, False]
    assert got.rewards.tolist() == [-2.0] * 6 + [0.0, 1.0, 1.0]
    supervised = group_advantages(got.rewards, OFFSETS, mask=got.trains)[6:]
    assert got.advantages.tolist() == pytest.approx([0.0, 1.0, 0.0, 3.0, 0.0, 0.0, *supervised.tolist()])
    assert got.token_advantages is not None
    assert got.token_advantages[[1, 3]].tolist() == [[10.5, 22.0], [11.5, 26.0]]
    assert torch.equal(got.token_advantages[6:8], supervised[:2, None].expand(2, 2))
    assert not got.token_advantages[~got.trains].any()
    assert torch.equal(seen[0].trains, chosen(iqr_filter=True).trains)
    assert torch.equal(seen[0].token_entropy, ENTROPY)
    assert seen[0].logprob is seen[0].tokens is None  # they were not asked for
    with pytest.raises(ValueError, match="reward_share: expected a method whose advantages follow from its rewards"):
        chosen(method="own", rewards=torch.ones(9), reward_share=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "gold", "gold_labels": True},
            "gold_labels: expected a method other than gold, which requires every true",
        ),
        ({"answer_weight": 1.5}, "answer_weight: expected"),
    ],
)
def test_options_without_an_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MethodOptions(**options).check_use(momentum=False)


@pytest.mark.parametrize(
    ("options", "rollouts", "most"),
    [
        ({"method": "srt"}, 8, 8),
        ({"method": "mgrpo"}, 8, 8),
        ({"method": "restrain"}, 5, 5),
        ({"method": "co_rewarding_1"}, 9, 4),
        ({"method": "self_harmony"}, 9, 9),
        ({"method": "co_rewarding"}, 9, 4),
    ],
)
def test_more_votes_than_there_are_voters_are_refused(options: dict[str, object], rollouts: int, most: int) -> None:
    def check(**more: object) -> None:
        chosen = MethodOptions(**{**options, **more})  # type: ignore[arg-type]
        chosen.momentum_count(rollouts)
        chosen.second_wording_count(rollouts)

    check(min_votes=most)
    with pytest.raises(ValueError, match="min_votes"):
        check(min_votes=most + 1)
    check(method="soft_vote", min_votes=most + 1)  # reads no label


@pytest.mark.parametrize("rollouts", [0, 1])
def test_a_single_rollout_has_nothing_to_be_compared_with(rollouts: int) -> None:
    with pytest.raises(ValueError, match=f"rollouts: expected at least 2, to compare with each other, got {rollouts}"):
        MethodOptions(method="srt").momentum_count(rollouts)
