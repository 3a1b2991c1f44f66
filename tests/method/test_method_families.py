"""The newer methods against plain references over lists, on random groups and on hostile ones."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from contract import watch_memory
from torch import Tensor

from mgrpo_kernels import majority_vote
from mgrpo_kernels.method import METHODS, MethodOptions, Outcome, Signals, select
from mgrpo_kernels.method.rewards import novelty
from mgrpo_kernels.method.rewards.forks import forking
from mgrpo_kernels.method.rewards.novelty import similarity

L = 7


class Rollout(NamedTuple):
    """One rollout of a prompt; `entropy` and `logprob` have a number for each of its tokens."""

    answer: str | None
    votes: bool
    trains: bool
    tokens: list[int]
    entropy: list[float]
    logprob: list[float]

    @property
    def level(self) -> float:
        return statistics.fmean(self.entropy) if self.entropy else math.nan


Group = list[Rollout]


def group_of(answers: list[str | None], seed: int = 0, *, everybody: bool = True) -> Group:
    draw = random.Random(seed)
    found = []
    for answer in answers:
        n = draw.randint(1, L)
        tokens = [draw.randint(0, 3) for _ in range(n)]
        numbers = [draw.uniform(0.01, 2.0) for _ in range(n)]
        flags = [everybody or draw.random() < 0.7 for _ in range(2)]
        found.append(Rollout(answer, *flags, tokens, numbers, [-draw.uniform(0.0, 3.0) for _ in range(n)]))
    return found


def random_groups(seed: int) -> list[Group]:
    draw = random.Random(seed)
    sizes = [draw.randint(1, 9) for _ in range(5)]
    return [
        group_of(
            [draw.choice(["a", "a", "a", "b", "b", "c", "d", None]) for _ in range(size)],
            draw.random(),
            everybody=False,
        )  # type: ignore[arg-type]
        for size in sizes
    ]


HOSTILE: dict[str, list[Group]] = {
    "no answers": [group_of([None] * 4)],
    "one rollout": [group_of(["a"]), group_of([None])],
    "all equal": [group_of(["a"] * 6)],
    "all different": [group_of([*"abcdefgh"])],
    "a tie": [group_of([*"aabb"])],
    "a thin plurality": [group_of([*"aaabcdefg"])],
    "one answer": [group_of([None, "a", None])],
    "nobody votes": [[each._replace(votes=False) for each in group_of([*"aab"])]],
    "nobody trains": [[each._replace(trains=False) for each in group_of([*"aab"])]],
    "an empty response": [[Rollout(None, False, False, [], [], []), *group_of([*"aab"])]],
    "the same tokens": [
        [each._replace(tokens=[1, 2], entropy=[1.0, 0.5], logprob=[-1.0, -2.0]) for each in group_of([*"aaabb"])]
    ],
    "no entropy at all": [[each._replace(entropy=[0.0] * len(each.entropy)) for each in group_of([*"aaab"])]],
}
CASES = {f"random {seed}": random_groups(seed) for seed in range(12)} | HOSTILE


def padded(rows: list[list[Any]], filler: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor([row + [filler] * (L - len(row)) for row in rows], dtype=dtype)


def signals_of(groups: list[Group], min_votes: int = 2, scale: str = "std") -> Signals:
    rows = [each for group in groups for each in group]
    offsets = torch.tensor([0, *(len(group) for group in groups)]).cumsum(0)
    voters = torch.tensor([each.votes for each in rows])
    return Signals(
        vote=majority_vote(
            [each.answer for each in rows], offsets, voters=voters, equivalence="exact", min_votes=min_votes
        ),
        offsets=offsets,
        nonempty=torch.tensor([bool(each.tokens) for each in rows]),
        entropy=torch.tensor([each.level for each in rows]),
        self_certainty=None,
        correct=None,
        generator=None,
        voters=voters,
        trains=torch.tensor([each.trains for each in rows]),
        scale=scale,
        mask=padded([[True] * len(each.tokens) for each in rows], False, torch.bool),
        token_entropy=padded([each.entropy for each in rows], math.nan, torch.float32),
        logprob=padded([each.logprob for each in rows], math.nan, torch.float32),
        tokens=padded([each.tokens for each in rows], 0, torch.int64),
    )


def outcome_of(method: str, groups: list[Group], **more: Any) -> Outcome:
    found = METHODS[method].rewards(signals_of(groups, **more))  # type: ignore[index]
    outcome = found if isinstance(found, Outcome) else Outcome(found)
    assert outcome.rewards.dtype == torch.float32
    assert outcome.rewards.shape == (sum(map(len, groups)),)
    return outcome


def near(values: Tensor | None, want: list[Any]) -> None:
    assert values is not None
    torch.testing.assert_close(values, torch.tensor(want, dtype=values.dtype), rtol=1e-4, atol=1e-5, equal_nan=True)


def label_of(group: Group, min_votes: int = 2) -> str | None:
    """Return the most frequent answer of the voters, the earliest of several."""
    votes = Counter(each.answer for each in group if each.votes and each.answer is not None)
    answer, count = max(votes.items(), key=lambda pair: pair[1], default=(None, 0))
    return answer if count >= min_votes else None


# --- RESTRAIN


def restrain_of(group: Group, delta: float = 1.0, width: float = 0.5) -> tuple[list[float], list[float]]:
    label, votes = label_of(group), Counter(each.answer for each in group if each.votes and each.answer is not None)
    if label is None:
        return [0.0] * len(group), [-delta] * len(group)
    shaped = {answer: math.exp(-((count / votes.total() - 1) ** 2) / (2 * width**2)) for answer, count in votes.items()}
    weights = {answer: each / sum(shaped.values()) for answer, each in shaped.items()}
    advantages = [0.0] * len(group)
    for answer, weight in weights.items():
        rewards = [float(each.answer == answer) for each in group]
        trained = [reward for reward, each in zip(rewards, group, strict=True) if each.trains]
        if len(trained) < 2 or len(set(trained)) == 1:
            continue
        mean, spread = statistics.fmean(trained), statistics.stdev(trained)
        for i, each in enumerate(group):
            if each.trains:
                advantages[i] += weight * (rewards[i] - mean) / (spread + 1e-6)
    return [weights.get(each.answer, 0.0) for each in group], advantages  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES)
def test_restrain(case: str) -> None:
    got = outcome_of("restrain", CASES[case])
    want = [restrain_of(group) for group in CASES[case]]
    near(got.rewards, [reward for rewards, _ in want for reward in rewards])
    near(got.advantages, [advantage for _, advantages in want for advantage in advantages])


def test_restrain_without_a_second_answer_has_nothing_to_learn_and_with_none_pushes_all_down() -> None:
    assert outcome_of("restrain", HOSTILE["all equal"]).advantages.tolist() == [0.0] * 6  # type: ignore[union-attr]
    assert outcome_of("restrain", HOSTILE["all different"]).advantages.tolist() == [-1.0] * 8  # type: ignore[union-attr]


# --- SCRL


def scrl_of(group: Group) -> list[float]:
    label, voters = label_of(group), [each for each in group if each.votes]
    mean = (
        statistics.fmean([each.level for each in group if each.tokens])
        if any(each.tokens for each in group)
        else math.nan
    )
    share = {each.answer: sum(one.answer == each.answer for one in voters) / max(len(voters), 1) for each in group}
    level = {
        answer: statistics.fmean([one.level for one in group if one.answer == answer and one.tokens] or [math.nan])
        for answer in share
    }
    ranked = sorted((s for answer, s in share.items() if answer is not None), reverse=True) + [0.0, 0.0]
    strict = ranked[0] >= 0.375 and ranked[0] - ranked[1] > 0.125
    rewards = []
    for each in group:
        if each.answer is None:
            rewards.append(-1.0)
            continue
        p, surprise = share[each.answer], level[each.answer] - mean
        if strict and each.answer == label:
            rewards.append(p - 0.1 * surprise)
        elif p < 0.125 and surprise >= 0:
            rewards.append(p - 0.125 - 0.1 * surprise)
        else:
            rewards.append(-0.1 * surprise)
    return rewards


@pytest.mark.parametrize("case", CASES)
def test_scrl(case: str) -> None:
    near(outcome_of("scrl", CASES[case]).rewards, [reward for group in CASES[case] for reward in scrl_of(group)])


def test_scrl_penalises_a_rare_answer_of_high_entropy_and_no_weak_majority_is_a_label() -> None:
    level = {"a": 1.0, "b": 2.0, "c": 0.5}
    nine = [Rollout(answer, True, True, [1], [level[answer]], [-1.0]) for answer in "aaaaaaabc"]
    got = outcome_of("scrl", [nine]).rewards
    assert got[0] > 0.7  # 7 of 9
    assert got[7] < -0.01 < got[8]  # rare and unsure; rare and sure
    weak = [each._replace(entropy=[1.0]) for each in [*nine[:3], *[nine[7]] * 3, *[nine[8]] * 3]]
    assert outcome_of("scrl", [weak]).rewards.tolist() == pytest.approx([0.0] * 9)


# --- DARE


def dare_of(group: Group) -> tuple[list[float], list[bool]]:
    n = Counter(each.answer for each in group if each.votes and each.answer is not None)
    u = {a: statistics.fmean([each.level for each in group if each.answer == a]) for a in n}

    def distribution(answers: list[str]) -> dict[str, float]:
        scores = {a: n[a] / (u[a] + 1e-6) for a in answers}
        return {a: score / sum(scores.values()) for a, score in scores.items()}

    first = distribution(list(n))
    kept = [a for a in n if first[a] >= 0.05] or list(n)
    p, total = distribution(kept), sum(n[a] for a in kept)
    rewards = {a: p[a] + 0.1 * (1 - n[a] / total) * (1 - u[a]) for a in kept}
    return (
        [rewards.get(each.answer, 0.0) for each in group],  # type: ignore[arg-type]
        [each.answer is None or each.answer in kept for each in group],
    )


@pytest.mark.parametrize("case", CASES)
def test_dare(case: str) -> None:
    got, want = outcome_of("dare", CASES[case]), [dare_of(group) for group in CASES[case]]
    near(got.rewards, [reward for rewards, _ in want for reward in rewards])
    assert got.trains is not None
    assert got.trains.tolist() == [flag for _, flags in want for flag in flags]


def test_dare_prunes_an_improbable_answer_unless_all_are() -> None:
    sure = [Rollout("a", True, True, [1], [0.1], [-1.0])] * 9
    rare = Rollout("b", True, True, [1], [2.0], [-1.0])
    assert outcome_of("dare", [[*sure, rare]]).trains.tolist() == [True] * 9 + [False]  # type: ignore[union-attr]
    many = [rare._replace(answer=str(number)) for number in range(25)]
    got = outcome_of("dare", [many])
    assert got.trains is not None
    assert got.trains.all()
    near(got.rewards, [1 / 25 - 0.1 * (1 - 1 / 25)] * 25)


# --- ResZero


def reszero_of(group: Group, c: float = 0.01) -> list[float]:
    label, voters = label_of(group), [i for i, each in enumerate(group) if each.votes]
    if label is None:
        return [0.0] * len(group)
    alpha = sum(group[i].answer == label for i in voters) / len(voters)
    rest = [i for i in voters if group[i].answer != label]

    def support(i: int) -> float:
        others = [j for j in rest if j != i]
        answer = group[i].answer
        return sum(group[j].answer == answer for j in others) / len(others) if others and answer is not None else 0.0

    mean = statistics.fmean([support(i) for i in rest]) if rest else 0.0
    return [
        (-c * alpha if each.answer == label else alpha * (support(i) - mean)) + c * alpha**2
        for i, each in enumerate(group)
    ]


@pytest.mark.parametrize("case", CASES)
def test_reszero(case: str) -> None:
    near(outcome_of("reszero", CASES[case]).rewards, [reward for group in CASES[case] for reward in reszero_of(group)])


@pytest.mark.parametrize("answers", ["aaabbc", "aab", "aaaa", "aabcdee"])
def test_reszero_has_sum_zero_and_is_lowest_for_the_most_frequent_answer(answers: str) -> None:
    got = outcome_of("reszero", [group_of([*answers])]).rewards
    assert float(got.sum()) == pytest.approx(0.0, abs=1e-6)
    second = [i for i, answer in enumerate(answers) if answers.count(answer) == 2 and answer != "a"]
    assert all(got[i] > got[0] for i in second)


# --- EVOL-RL


def cosine(one: list[int], other: list[int]) -> float:
    a, b = (Counter([*((token,) for token in ids), *itertools.pairwise(ids)]) for ids in (one, other))  # type: ignore[list-item]
    dot = sum(a[gram] * b[gram] for gram in a)
    return dot / math.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values()))


def evol_of(group: Group) -> list[float]:
    label = label_of(group)
    if label is None:
        return [0.0] * len(group)
    answered = [i for i, each in enumerate(group) if each.answer is not None]
    novelty = {}
    for i in answered:
        others = [j for j in answered if j != i]
        same = [j for j in others if (group[j].answer == label) == (group[i].answer == label)] or others
        if not others:
            novelty[i] = 0.5
            continue
        alike = {j: cosine(group[i].tokens, group[j].tokens) for j in others}
        novelty[i] = 1 - (statistics.fmean(alike[j] for j in same) + max(alike.values())) / 2
    rewards = [-1.0] * len(group)
    for wins, lowest in ((True, 0.5), (False, -1.0)):
        members = [i for i in answered if (group[i].answer == label) == wins]
        if len(members) == 1:
            rewards[members[0]] = lowest + 0.5
            continue
        bounds = [novelty[i] for i in members] or [0.0]
        low, high = min(bounds), max(bounds)
        for i in members:
            rewards[i] = lowest + 0.5 * ((novelty[i] - low) / (high - low) if high - low > 1e-6 else 0.5)
    return rewards


@pytest.mark.parametrize("case", CASES)
def test_evol_rl(case: str) -> None:
    near(outcome_of("evol_rl", CASES[case]).rewards, [reward for group in CASES[case] for reward in evol_of(group)])


def test_evol_rl_prefers_the_response_that_is_unlike_the_others() -> None:
    alike, other = [1, 2, 3, 4], [5, 6, 7]
    rows = [
        Rollout(a, True, True, t, [1.0] * len(t), [-1.0] * len(t))
        for a, t in zip("aaabb", [alike, alike, other, alike, other], strict=True)
    ]
    got = outcome_of("evol_rl", [rows]).rewards
    assert got[2] > got[0] == got[1] >= 0.5
    assert -1 <= got[3] <= -0.5
    assert similarity([torch.tensor(alike), torch.tensor(other)]).tolist() == [
        [pytest.approx(1), 0],
        [0, pytest.approx(1)],
    ]


def drawn_responses(responses: int, length: int, vocab: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab, (length - row,), generator=generator) for row in range(responses)]


@pytest.mark.parametrize("vocab", [3, 40, 2**31 - 1])
def test_similarity_is_that_of_the_definition_whatever_the_blocks(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    responses = [*drawn_responses(4, 50, vocab), torch.tensor([vocab - 1]), torch.tensor([], dtype=torch.int64)]
    got = similarity(responses)
    for (i, one), (j, other) in itertools.product(enumerate(responses), repeat=2):
        expected = cosine(one.tolist(), other.tolist()) if len(one) and len(other) else 0.0
        assert got[i, j].item() == pytest.approx(expected, rel=1e-7, abs=1e-9)
    for kinds in (1, 7, 64):
        monkeypatch.setattr(novelty, "KINDS_AT_ONCE", kinds)
        assert torch.equal(similarity(responses), got)


def test_similarity_needs_memory_for_the_tokens_not_for_all_of_them_in_each_response() -> None:
    responses = drawn_responses(64, 5000, 100_000)
    with watch_memory() as memory:
        similarity(responses)
    grams, block = 8 * 2 * sum(map(len, responses)), 8 * len(responses) * novelty.KINDS_AT_ONCE
    assert memory.peak < 10 * grams + 2 * block  # 68 MB; counts of every kind for each response take 108


# --- SPINE


def spine_of(row: Rollout) -> tuple[list[float], list[float]]:
    n = len(row.tokens)
    known = [i for i in range(n) if not math.isnan(row.entropy[i])]
    forks = sorted(known, key=lambda i: -row.entropy[i])[: math.ceil(n / 5)]
    weights, bonus = [0.0] * L, [0.0] * L
    levels = sorted(row.entropy[i] for i in forks)

    def quantile(q: float) -> float:
        place = q * (len(levels) - 1)
        low = math.floor(place)
        return levels[low] + (place - low) * (levels[min(low + 1, len(levels) - 1)] - levels[low])

    for i in forks:
        weights[i] = 1.0
        side = (row.entropy[i] > quantile(0.5)) - (row.entropy[i] < quantile(0.1))
        bonus[i] = 0.1 * side * (row.logprob[i] + row.entropy[i])
    return weights, bonus


@pytest.mark.parametrize("case", CASES)
def test_spine(case: str) -> None:
    got = outcome_of("spine", CASES[case])
    rows = [each for group in CASES[case] for each in group]
    near(got.token_weights, [spine_of(row)[0] for row in rows])
    near(got.token_bonus, [spine_of(row)[1] for row in rows])
    labels = [label_of(group) for group in CASES[case] for _ in group]
    near(
        got.rewards,
        [float(row.answer is not None and row.answer == label) for row, label in zip(rows, labels, strict=True)],
    )


def test_spine_leaves_out_tokens_whose_entropy_is_not_a_number_and_takes_the_earlier_of_equals() -> None:
    entropy = torch.tensor([[math.nan, 1.0, 1.0, 0.5, 0.2, math.nan]])
    assert forking(entropy, torch.tensor([5])).tolist() == [[False, True, False, False, False, False]]
    assert forking(entropy, torch.tensor([6])).tolist() == [[False, True, True, False, False, False]]
    assert not forking(torch.full((1, 3), math.nan), torch.tensor([3])).any()


def test_the_band_moves_the_entropy_of_a_token_into_it() -> None:
    # The gradient of -bonus x log p over the tokens that the policy samples is that of the penalty.
    logits = torch.tensor([2.0, 0.5, -1.0, 0.0], requires_grad=True)
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum()
    (want,) = torch.autograd.grad(entropy, logits, retain_graph=True)
    surprise = (logp + entropy).detach()
    (got,) = torch.autograd.grad(-(logp.exp().detach() * surprise * logp).sum(), logits)
    torch.testing.assert_close(got, want)


# --- All of them


@pytest.mark.parametrize("method", ["scrl", "dare", "spine"])
def test_a_rollout_whose_entropy_is_not_a_number_does_not_spoil_its_group(method: str) -> None:
    rows = group_of([*"aaaabb"])
    signals = signals_of([rows])
    assert signals.entropy is not None
    assert signals.token_entropy is not None
    broken = signals._replace(
        entropy=torch.where(torch.arange(6) == 1, torch.nan, signals.entropy),
        token_entropy=torch.where(torch.arange(6)[:, None] == 1, torch.nan, signals.token_entropy),
    )
    found = METHODS[method].rewards(broken)  # type: ignore[index]
    outcome = found if isinstance(found, Outcome) else Outcome(found)
    assert outcome.rewards.isfinite().all()
    if method == "spine":
        assert outcome.token_weights is not None
        assert not outcome.token_weights[1].any()


@pytest.mark.parametrize("name", ["scrl", "dare"])
def test_if_no_entropy_of_an_answer_is_a_number_its_rollouts_do_not_train(name: str) -> None:
    mask = torch.ones(6, 1, dtype=torch.bool)
    entropy = torch.tensor([[0.5], [0.6], [0.7], [0.8], [math.nan], [math.nan]])
    options = MethodOptions(method=name, equivalence="exact")  # type: ignore[arg-type]
    got = select(mask, [*"aaccbb"], torch.tensor([0, 6]), options, entropy=entropy)
    assert got.advantages.isfinite().all()
    assert not got.trains[4:].any()
    assert got.trains[:3].all()


@pytest.mark.parametrize("method", ["evol_rl", "restrain", "scrl", "dare", "spine", "reszero"])
@pytest.mark.parametrize("case", CASES)
def test_each_group_is_on_its_own(method: str, case: str) -> None:
    groups = CASES[case]
    together = outcome_of(method, groups)
    alone = [outcome_of(method, [group]) for group in groups]
    for name in Outcome._fields:
        whole, parts = getattr(together, name), [getattr(each, name) for each in alone]
        assert (whole is None) == (parts[0] is None)
        if whole is not None:
            torch.testing.assert_close(whole, torch.cat(parts), equal_nan=True)


@pytest.mark.parametrize("method", ["evol_rl", "restrain", "scrl", "dare", "spine", "reszero"])
def test_no_rollouts_at_all(method: str) -> None:
    empty = torch.zeros(0, L)
    options = MethodOptions(method=method)  # type: ignore[arg-type]
    got = select(empty.bool(), [], torch.tensor([0]), options, entropy=empty, logprob=empty, tokens=empty.long())
    assert got.advantages.shape == (0,)


# --- The confident vote


def test_a_vote_counts_by_its_self_certainty() -> None:
    mask = torch.ones(5, 2, dtype=torch.bool)
    certainty = torch.tensor([1.0, 1.0, 5.0, 4.0, 2.0])[:, None].expand(5, 2)
    options = MethodOptions(method="confident_vote", equivalence="exact", min_votes=1)
    got = select(mask, ["a", "a", "b", None, "c"], 5, options, self_certainty=certainty)
    assert got.vote is not None
    assert got.vote.labels == ["b"]
    assert got.rewards.tolist() == [0, 0, 1, 0, 0]
    assert got.vote.share.tolist() == pytest.approx([5 / 9])
    assert got.share_of_all.tolist() == pytest.approx([5 / 13])
    assert got.vote.cluster_share.tolist() == pytest.approx([2 / 9, 2 / 9, 5 / 9, 0, 2 / 9])
    two = MethodOptions(method="confident_vote", equivalence="exact", min_votes=2)
    assert select(mask, ["a", "a", "b", None, "c"], 5, two, self_certainty=certainty).vote.labels == [None]  # type: ignore[union-attr]
    broken = certainty.clone()
    broken[2] = math.nan  # it does not vote
    assert select(mask, ["a", "a", "b", None, "c"], 5, two, self_certainty=broken).vote.labels == ["a"]  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(20))
def test_weighted_votes_against_a_plain_count(seed: int) -> None:
    draw = random.Random(seed)
    answers = [draw.choice(["a", "b", "c", None]) for _ in range(9)]
    weights, voters = [draw.choice([0.0, 0.5, 1.0, 3.0]) for _ in answers], [draw.random() < 0.8 for _ in answers]
    got = majority_vote(answers, 9, voters=voters, weights=weights, min_votes=2, min_share=0.3)
    sums: dict[str, float] = {}
    counts: Counter[str] = Counter()
    for answer, weight, votes in zip(answers, weights, voters, strict=True):
        if votes and answer is not None:
            sums[answer] = sums.get(answer, 0.0) + weight
            counts[answer] += 1
    total = sum(sums.values())
    everybody = sum(weight for weight, votes in zip(weights, voters, strict=True) if votes)
    best = max(sums, key=lambda answer: sums[answer], default=None)
    wins = best is not None and total > 0 and counts[best] >= 2 and sums[best] / everybody >= 0.3
    assert got.labels == [best if wins else None]
    assert got.cluster_share.tolist() == pytest.approx(
        [sums.get(a, 0.0) / total if a and total else 0.0 for a in answers]
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "weights: expected one for each of the 2 answers, got 1"),
        ([1.0, -1.0], r"weights\[1\]"),
        ([math.nan, 1.0], r"weights\[0\]"),
    ],
)
def test_weights_that_are_no_weights(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        majority_vote(["a", "b"], 2, weights=weights)
