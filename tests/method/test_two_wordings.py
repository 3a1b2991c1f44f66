"""Methods that ask a question in two wordings, against a plain count: who elects the label, what is rewarded, and compared with what."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from mgrpo_kernels import group_advantages
from mgrpo_kernels.method import METHODS, MethodOptions, select
from mgrpo_kernels.method.election import harmonic_weights, offsets_of_wordings

G, P = 8, 3
SECOND = torch.tensor([False] * (G // 2) + [True] * (G // 2)).repeat(P)


def draw(seed: int) -> list[str | None]:
    numbers = random.Random(seed)
    return [numbers.choice(["1", "1", "2", "3", None]) for _ in range(P * G)]


def chosen(method: str, answers: list[str | None], **more: object):
    options = MethodOptions(method=method, equivalence="exact", min_votes=1, iqr_filter=False)  # type: ignore[arg-type]
    mask = torch.ones(len(answers), 2, dtype=torch.bool)
    return select(mask, answers, G, options, second_wording=SECOND, **more)  # type: ignore[arg-type]


def most_frequent(answers: list[str | None]) -> str | None:
    counts = Counter(each for each in answers if each is not None)
    return max(counts, key=lambda each: counts[each]) if counts else None  # of two, the one that came first


@pytest.mark.parametrize("seed", range(20))
def test_each_wording_is_rewarded_by_the_vote_of_the_other(seed: int) -> None:
    answers = draw(seed)
    got = chosen("co_rewarding_1", answers)
    assert got.vote is not None
    for p in range(P):
        group = answers[p * G : (p + 1) * G]
        first, second = most_frequent(group[: G // 2]), most_frequent(group[G // 2 :])
        expected = [float(each is not None and each == second) for each in group[: G // 2]]
        expected += [float(each is not None and each == first) for each in group[G // 2 :]]
        assert got.rewards[p * G : (p + 1) * G].tolist() == expected
        assert got.vote.labels[p] == second  # what the first wording is rewarded by


@pytest.mark.parametrize("seed", range(20))
def test_the_label_has_the_highest_harmonic_mean(seed: int) -> None:
    answers = draw(seed)
    got = chosen("self_harmony", answers)
    assert got.vote is not None
    for p in range(P):
        group = answers[p * G : (p + 1) * G]
        halves = [[each for each in half if each is not None] for half in (group[: G // 2], group[G // 2 :])]
        scores = {}
        for each in dict.fromkeys(halves[0] + halves[1]):
            shares = [half.count(each) / len(half) if half else 0.0 for half in halves]
            scores[each] = 2 * shares[0] * shares[1] / sum(shares) if min(shares) > 0 else 0.0
        label, rewards = got.vote.labels[p], got.rewards[p * G : (p + 1) * G].tolist()
        if max(scores.values(), default=0.0) == 0.0:
            assert label is None
        else:
            assert scores[label] == pytest.approx(max(scores.values()))  # type: ignore[index]
            assert float(got.vote.share[p]) == pytest.approx(scores[label] / sum(scores.values()))  # type: ignore[index]
        assert rewards == [float(label is not None and each == label) for each in group]


def test_an_answer_of_one_wording_only_does_not_win() -> None:
    answers: list[str | None] = [*"1112", *"3332"] * P
    assert chosen("self_harmony", answers).vote.labels == ["2"] * P
    assert chosen("srt", answers).vote.labels == ["1"] * P  # the plain vote takes the first of two


def test_only_voters_count() -> None:
    cluster = torch.tensor([0, 0, 1, 1, 0, 1])
    second = torch.tensor([False] * 3 + [True] * 3)
    voters = torch.tensor([True, False, True, True, True, False])
    weights = harmonic_weights(cluster, torch.tensor([0, 6]), voters, second)
    assert weights.tolist() == [0.25, 0, 0.25, 0.25, 0.25, 0]  # both answers have a half of either wording


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.second_wording == "policy"])
def test_advantages_compare_rollouts_of_the_same_wording(method: str) -> None:
    answers: list[str | None] = [*"1123", *"1111"] * P
    got = chosen(method, answers)
    halves = torch.arange(0, P * G + 1, G // 2)
    torch.testing.assert_close(got.advantages, group_advantages(got.rewards, halves))
    assert got.rewards.reshape(P, 2, -1)[:, 1].eq(1).all()
    assert not got.advantages.reshape(P, 2, -1)[:, 1].any()  # all of them are right
    assert got.advantages.reshape(P, 2, -1)[:, 0].abs().sum(-1).gt(0).all()


def test_the_teacher_elects_in_its_own_wording() -> None:
    answers: list[str | None] = [*"1112", *"3332"] * P
    got = chosen("co_rewarding_3", answers, by_momentum=SECOND)
    assert got.vote.labels == ["3"] * P
    assert got.trains.tolist() == (~SECOND).tolist()
    assert not got.rewards[~SECOND].any()


@pytest.mark.parametrize("seed", range(10))
def test_policy_and_momentum_model_have_to_agree(seed: int) -> None:
    answers = draw(seed)
    mask = torch.ones(len(answers), 2, dtype=torch.bool)
    options = MethodOptions(method="dcrl", equivalence="exact", min_votes=1)
    got = select(mask, answers, G, options, by_momentum=SECOND)
    assert got.vote.labels == chosen("self_harmony", answers).vote.labels  # the same parties, by another criterion
    assert got.trains.tolist() == (~SECOND).tolist()
    whole = torch.arange(0, P * G + 1, G)
    expected = group_advantages(got.rewards, whole, mask=~SECOND)
    torch.testing.assert_close(got.advantages, expected)
    with pytest.raises(
        ValueError, match="momentum_rollouts: expected >= 1 with method dcrl, which has no labels without"
    ):
        MethodOptions(method="dcrl", momentum_rollouts=0).momentum_count(8)


def test_no_answers_and_no_rollouts() -> None:
    for method in ("co_rewarding_1", "self_harmony"):
        got = chosen(method, [None] * (P * G))
        assert got.vote.labels == [None] * P
        assert not got.rewards.any()
        empty = torch.zeros(0, 2, dtype=torch.bool)
        options = MethodOptions(method=method)  # type: ignore[arg-type]
        none = select(empty, [], torch.tensor([0]), options, second_wording=empty.any(-1))
        assert none.advantages.shape == (0,)


def test_offsets_divide_groups() -> None:
    offsets, second = torch.tensor([0, 3, 3, 5]), torch.tensor([False, True, True, False, False])
    assert offsets_of_wordings(offsets, second).tolist() == [0, 1, 3, 3, 3, 5, 5]
    with pytest.raises(ValueError, match="second_wording: expected the rollouts of a group's first wording before"):
        offsets_of_wordings(offsets, torch.tensor([True, False, True, False, False]))


@pytest.mark.parametrize("method", ["co_rewarding_1", "self_harmony"])
def test_what_does_not_go_together(method: str) -> None:
    options = MethodOptions(method=method, momentum_rollouts=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"momentum_rollouts: expected 0 with method {method}, whose .*got 4"):
        options.check_use(momentum=True)
    options = MethodOptions(method=method)  # type: ignore[arg-type]
    assert [options.second_wording_count(each) for each in (4, 5, 8)] == [2, 2, 4]
    with pytest.raises(ValueError, match=f"rollouts: expected at least 4 with method {method} .*got 3"):
        options.second_wording_count(3)
    with pytest.raises(ValueError, match=f"second_wording: expected a value, which method {method} requires, got None"):
        select(torch.ones(8, 2, dtype=torch.bool), ["1"] * 8, 8, options)
    assert MethodOptions(method="srt").second_wording_count(3) == 0
    assert MethodOptions(method="co_rewarding_3", min_votes=1).second_wording_count(8) == 4
