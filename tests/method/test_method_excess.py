"""Votes by excess: against a plain reference, and what they change in a selection."""

import random
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from mgrpo_kernels.method import MethodOptions, select
from mgrpo_kernels.method.excess import excess_weights


def plain(answers, offsets, voters):
    """Return the weights by their definition, in exact numbers."""
    out = []
    for start, end in pairwise(offsets):
        here = [answers[i] for i in range(start, end) if voters[i] and answers[i]]
        other = [answers[i] for i in range(len(answers)) if not start <= i < end and voters[i] and answers[i]]
        for i in range(start, end):
            if not voters[i] or not answers[i]:
                out.append(Fraction(0))
                continue
            share = Fraction(here.count(answers[i]), len(here))
            elsewhere = Fraction(other.count(answers[i]), len(other)) if other else Fraction(0)
            out.append(max(Fraction(0), share - elsewhere) / share)
    return out


@pytest.mark.parametrize("seed", range(20))
def test_weights_are_those_of_the_definition(seed):
    draw = random.Random(seed)
    sizes = [draw.choice([0, 1, 5, 8]) for _ in range(draw.randint(1, 5))]
    offsets = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    answers = [draw.choice(["7", "7", "7", "3", "5", None, ""]) for _ in range(offsets[-1])]
    voters = [draw.random() < 0.8 for _ in answers]
    got = excess_weights(answers, torch.tensor(offsets), torch.tensor(voters, dtype=torch.bool))
    torch.testing.assert_close(got, torch.tensor([float(each) for each in plain(answers, offsets, voters)]))


def chosen(answers, **options):
    options = {"method": "srt", "equivalence": "exact", "min_votes": 1, **options}
    mask = torch.ones(len(answers), 2, dtype=torch.bool)
    given = {"self_certainty": torch.ones(mask.shape)} if options["method"] == "confident_vote" else {}
    return select(mask, answers, 5, MethodOptions(**options), **given)


COMMON = ["7", "7", "7", "3", "3", "7", "7", "7", "4", "4"]


@pytest.mark.parametrize("method", ["srt", "confident_vote", "soft_vote"])
def test_an_answer_that_every_prompt_gets_does_not_win(method):
    counted, excess = (chosen(COMMON, method=method, vote_by=each) for each in ("count", "excess"))
    assert counted.vote.labels == ["7", "7"]
    assert excess.vote.labels == ["3", "4"]
    assert excess.rewards[3] > excess.rewards[0]
    assert excess.vote.share.tolist() == [1.0, 1.0]  # of the excess, none of which is that of 7


@pytest.mark.parametrize("method", ["co_rewarding_1", "self_harmony"])
def test_an_answer_that_every_prompt_gets_does_not_win_in_two_wordings(method):
    answers = ["7", "7", "3", "7", "7", "3", "7", "7", "4", "7", "7", "4"]
    mask, second = torch.ones(12, 2, dtype=torch.bool), torch.arange(12) % 6 >= 3
    for vote_by, labels in (("count", ["7", "7"]), ("excess", ["3", "4"])):
        options = MethodOptions(method=method, equivalence="exact", min_votes=1, vote_by=vote_by)
        found = select(mask, answers, 6, options, second_wording=second)
        assert found.vote.labels == labels
        assert [answer for answer, reward in zip(answers, found.rewards, strict=True) if reward == 1] == [
            answer for answer in answers if (answer == "7") == (vote_by == "count")
        ]


def test_answers_of_their_own_prompt_count_as_in_the_plain_vote():
    answers = ["1", "1", "2", None, "1", "8", "8", "8", "9", None]
    counted, excess = chosen(answers), chosen(answers, vote_by="excess")
    assert counted.vote.labels == excess.vote.labels == ["1", "8"]
    torch.testing.assert_close(counted.vote.share, excess.vote.share)
    torch.testing.assert_close(counted.share_of_all, torch.tensor([0.6, 0.6]))


def test_a_policy_with_one_answer_for_all_prompts_has_no_label_and_learns_nothing():
    found = chosen(["7"] * 10, vote_by="excess")
    assert found.vote.labels == [None, None]
    assert not found.advantages.any()


def test_an_option_without_effect_is_refused():
    options = MethodOptions(method="rent", vote_by="excess")
    with pytest.raises(ValueError, match="vote_by: expected a method that votes with it"):
        options.check_use(momentum=False)
    with pytest.raises(ValueError, match="vote_by"):
        MethodOptions(vote_by="both")


def test_other_spellings_of_an_answer_are_the_same_answer():
    answers = ["1/2", "0.5", r"\frac12", "3", "3", "0.5", "0.50", "50%", "4", "4"]
    assert chosen(answers, equivalence="math").vote.labels == ["1/2", "0.5"]
    assert chosen(answers, equivalence="math", vote_by="excess").vote.labels == ["3", "4"]
    halves = [answers[i] for i in (0, 1, 5, 6)]
    got = excess_weights(halves, torch.tensor([0, 2, 4]), torch.ones(4, dtype=torch.bool), "math")
    assert got.tolist() == [0.0] * 4
    texts = excess_weights(halves, torch.tensor([0, 2, 4]), torch.ones(4, dtype=torch.bool), "exact")
    assert texts.any()
