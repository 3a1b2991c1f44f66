"""The methods' rewards on a group whose right values can be read off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mgrpo_kernels import majority_vote
from mgrpo_kernels.method import METHODS, Gold, MethodOptions, Signals, gold_in_cell, select

ANSWERS = ["1", "1", "2", None, "5", "6", "7", "8"]  # two prompts of four
ENTROPY = torch.tensor([0.5, 0.1, 0.9, float("nan"), 0.2, 0.4, 0.6, 0.8])


def rewards(method: str, seed: int = 0, answers: list[str | None] = ANSWERS) -> Any:
    signals = Signals(
        vote=majority_vote(answers, 4),
        offsets=torch.tensor([0, 4, 8]),
        nonempty=~ENTROPY.isnan(),
        entropy=ENTROPY,
        self_certainty=torch.arange(8.0),
        correct=torch.tensor([0.0, 0, 1, 0, 1, 0, 0, 0]),
        generator=torch.Generator().manual_seed(seed),
        voters=~ENTROPY.isnan(),
        trains=~ENTROPY.isnan(),
        mask=~ENTROPY.isnan()[:, None],
        token_entropy=ENTROPY[:, None],
        logprob=-ENTROPY[:, None],
        tokens=torch.arange(8)[:, None],
    )
    found = METHODS[method].rewards(signals)
    got = found if isinstance(found, torch.Tensor) else found.rewards
    assert got.shape == (8,)
    assert got.dtype == torch.float32
    return pytest.approx(got.tolist())


@pytest.mark.parametrize("method", ["mgrpo", "srt", "ttrl", "co_rewarding"])
def test_agreement_with_the_label(method: str) -> None:
    assert rewards(method) == [1, 1, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("method", ["soft_vote", "om_grpo"])
def test_share_of_the_own_answer(method: str) -> None:
    assert rewards(method) == [2 / 3, 2 / 3, 1 / 3, 0, 0.25, 0.25, 0.25, 0.25]


def test_empo_gives_nothing_to_a_group_that_is_too_uncertain() -> None:
    assert rewards("empo") == [2 / 3, 2 / 3, 1 / 3, 0, 0, 0, 0, 0]


def test_empos_certainty_is_of_the_answers_alone() -> None:
    # Seven answers have entropy log 7, above 0.9 log 8; over eight rollouts it would be below.
    answers = [*"1234567", None]
    signals = Signals(
        vote=majority_vote(answers, 8),
        offsets=torch.tensor([0, 8]),
        nonempty=torch.ones(8, dtype=torch.bool),
        entropy=None,
        self_certainty=None,
        correct=None,
        generator=None,
    )
    assert not METHODS["empo"].rewards(signals).any()


@pytest.mark.parametrize("voting", ["1122", "1111", "1112", "1123"])
def test_empos_certainty_is_that_of_the_voters(voting: str) -> None:
    # Of eight rollouts four vote. The largest possible entropy is that of four answers of one vote each, log 4.
    options, mask = MethodOptions(method="empo"), torch.ones(8, 2, dtype=torch.bool)
    found, four = (
        select(mask, answers, 8, options, may_vote=torch.arange(8) < 4)
        for answers in ([*voting, *"5678"], [*"5678", *voting])
    )
    assert found.rewards[:4].all()
    assert not four.rewards.any()


@pytest.mark.parametrize(
    ("cell", "gold"),
    [
        ("x = \\boxed{7}", "7"),
        (7, "7"),
        (7.5, "7.5"),
        (np.int64(7), "7"),
        (np.array(["7", "8"]), ("7", "8")),
        (["7", None, 8], ("7", "8")),
        (["7", "7"], "7"),
        ([], None),
        ([None], None),
        ("  ", None),
        (None, None),
        (float("nan"), None),
        (np.float64("nan"), None),
    ],
)
def test_the_true_answers_of_a_cell(cell: object, gold: Gold | None) -> None:
    assert gold_in_cell(cell) == gold


@pytest.mark.parametrize("cell", [{"target": "7"}, [{"target": "7"}], object()])
def test_a_cell_with_something_else_is_named(cell: object) -> None:
    with pytest.raises(TypeError, match="expected a text, a number or a list of them as the true answer, got"):
        gold_in_cell(cell)


def test_certainty_and_entropy() -> None:
    assert rewards("intuitor") == [0, 1, 2, 0, 4, 5, 6, 7]
    assert rewards("rent") == [-0.5, -0.1, -0.9, 0, -0.2, -0.4, -0.6, -0.8]


def test_gold() -> None:
    assert rewards("gold") == [0, 0, 1, 0, 1, 0, 0, 0]


def test_coin_flips_follow_the_generator_alone() -> None:
    flips = [torch.tensor(rewards("random", seed).expected) for seed in range(200)]
    assert torch.equal(flips[0], torch.tensor(rewards("random", 0).expected))
    assert set(torch.stack(flips).unique().tolist()) == {0.0, 1.0}
    assert abs(float(torch.stack(flips).mean()) - 0.5) < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_reads_and_its_lowest_reward(method: str) -> None:
    row, before = METHODS[method], rewards(method).expected
    assert min(before) >= row.lowest
    other = rewards(method, answers=["2", "1", "2", None, "5", "5", "7", "8"]).expected
    assert (before == other) == (row.reads == "nothing")
    # The same label by a larger share: only a reward that depends on shares tells the difference.
    more = rewards(method, answers=["1", "1", None, None, "5", "6", "7", "8"]).expected
    # ResZero's depends on the shares of the other answers, of which this prompt has too few.
    assert method == "reszero" or (before != more) == (row.reads in ("shares", "both"))


def test_the_table_is_complete() -> None:
    assert list(METHODS) == [
        "mgrpo",
        "srt",
        "ttrl",
        "soft_vote",
        "empo",
        "om_grpo",
        "evol_rl",
        "restrain",
        "scrl",
        "spine",
        "dare",
        "confident_vote",
        "reszero",
        "intuitor",
        "rent",
        "co_rewarding",
        "co_rewarding_1",
        "co_rewarding_3",
        "self_harmony",
        "dcrl",
        "gold",
        "random",
    ]
    assert {name for name, row in METHODS.items() if row.filters} == {"mgrpo"}
    assert {name for name, row in METHODS.items() if row.momentum_share} == {
        "mgrpo",
        "co_rewarding",
        "co_rewarding_3",
        "dcrl",
    }
    assert {name for name, row in METHODS.items() if row.needs_gold} == {"gold"}
