"""The probe before a run: its figures, its verdict, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mgrpo_kernels.method import METHODS
from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train.data import demo
from mgrpo_kernels.train.probe import Figures, correlation, judge, lines, measure

WELL = Figures(
    prompts=100,
    rollouts=8,
    answered=1.0,
    vote_share=0.6,
    margin=0.4,
    top_label=0.1,
    top_answer=0.1,
    known=100,
    accuracy=0.5,
    majority=0.7,
    majority_error=0.046,
    confidently_wrong=0.1,
    share_correlation=0.4,
    logprob_correlation=0.3,
)


def word(**changes: Any) -> str:
    return judge(WELL._replace(**changes)).word


def test_figures_of_a_sample() -> None:
    """Three prompts with four rollouts each; of the second the true answer is unknown."""
    answers = ["1", "1", "1", "2", "3", "4", None, "3", "5", "5", "6", "6"]
    confidence = torch.tensor([-1.0, -1.0, -1.0, -2.0, -3.0, -3.0, -3.0, -3.0, -2.0, -2.0, -1.0, float("nan")])
    found = measure(answers, 4, ["1", None, "6"], confidence, equivalence="exact")
    assert found.answered == pytest.approx(11 / 12)
    assert found.vote_share == pytest.approx((3 / 4 + 2 / 3 + 2 / 4) / 3)
    assert found.margin == pytest.approx((2 / 4 + 1 / 3 + 0) / 3)
    assert found.top_label == pytest.approx(1 / 3)
    assert found.top_answer == pytest.approx(3 / 11)
    assert (found.known, found.accuracy, found.majority) == (2, pytest.approx(5 / 8), 0.5)
    assert found.majority_error == pytest.approx(1 / 4)
    assert found.confidently_wrong == 0.0  # the wrong label of the last has just half of the votes
    assert found.share_correlation is None  # of two prompts there is none
    right, level = [1, 1, 1, 0, 0, 0, 1], [-1.0, -1.0, -1.0, -2.0, -2.0, -2.0, -1.0]
    want = torch.corrcoef(torch.tensor([right, level]))[0, 1]
    assert found.logprob_correlation == pytest.approx(float(want))


def test_a_response_without_an_answer_has_no_part_in_the_correlation() -> None:
    found = measure(["1", "1", "2", None], 4, ["1"], torch.tensor([-1.0, -2.0, -3.0, -1.0]), equivalence="exact")
    want = torch.corrcoef(torch.tensor([[1.0, 1.0, 0.0], [-1.0, -2.0, -3.0]]))[0, 1]
    assert found.logprob_correlation == pytest.approx(float(want))


def test_without_true_answers_nothing_is_said_of_correctness() -> None:
    found = measure(["1", "1", "2", "3"], 2, [None, None], torch.zeros(4), equivalence="exact")
    assert found[7:] == (0, None, None, None, None, None, None)
    assert (found.vote_share, found.margin) == (0.75, 0.5)
    verdict = judge(found)
    assert verdict.word == "unknown"
    assert "Without true answers nothing shows whether the majority is right" in verdict.unknown
    assert any("accuracy of the majority: not known" in line for line in lines(found, verdict))


def test_a_label_without_enough_votes_is_wrong() -> None:
    found = measure(["1", "2"], 2, ["1"], torch.zeros(2), equivalence="exact", min_votes=2)
    assert found.majority == 0.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "improves"),
        ({"majority": 0.55}, "undecided"),
        ({"majority": 0.45}, "undecided"),
        ({"majority": 0.3}, "collapses"),
        ({"share_correlation": -0.3}, "undecided"),  # the more votes, the wronger
        ({"share_correlation": None}, "improves"),
        ({"majority": 0.7, "majority_error": 0.15, "known": 9}, "undecided"),  # too few prompts
        ({"majority": 1.0, "majority_error": 0.12, "known": 4}, "undecided"),  # all of so few are right by chance
        ({"majority": 0.0, "majority_error": 0.12, "known": 4}, "undecided"),
        ({"majority": 1.0, "majority_error": 0.1, "known": 5}, "improves"),
        ({"majority": 0.0, "majority_error": 0.1, "known": 5}, "collapses"),
        ({"majority": None, "majority_error": None, "known": 0}, "unknown"),
        ({"answered": 0.4}, "unfit"),
        ({"top_label": 0.62}, "unfit"),
        ({"top_label": 0.62, "prompts": 50}, "improves"),  # of so few prompts, by chance,
        ({"top_answer": 0.6}, "improves"),  # many responses alike, with labels that differ
        ({"vote_share": 0.99}, "unfit"),
        ({"majority": None, "majority_error": None, "answered": 0.4}, "unfit"),
    ],
)
def test_the_verdict(changes: dict[str, Any], expected: str) -> None:
    assert word(**changes) == expected


def test_a_verdict_has_its_figures_and_its_limits() -> None:
    verdict = judge(WELL._replace(majority=0.3, confidently_wrong=0.44))
    assert verdict.reason == (
        "the majority is right on 0.30 ± 0.05 of the prompts, wrong more often than right, and 0.44 of the prompts have a wrong label "
        "with more than half of the votes: the vote would entrench errors"
    )
    assert "estimates no step of a collapse" in verdict.unknown


def test_correlation_where_nothing_varies() -> None:
    assert correlation(torch.ones(5), torch.arange(5.0)) is None
    assert correlation(torch.arange(5.0), -torch.arange(5.0)) == pytest.approx(-1.0)


def test_the_command_prints_one_verdict_and_writes_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    def make_model(place: Path, *_: Any) -> None:
        made.append(place)
        place.mkdir(parents=True)
        for file in base.iterdir():
            (place / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(demo, "make_model", make_model)
    output = tmp_path / "run"
    assert command.main(["--probe", "12", "--rollouts", "6", "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("probe: 12 prompts x 6 rollouts, 12 prompts with a true answer") == 1
    assert shown.count("verdict: ") == shown.count("not known: The probe does not train") == 1
    assert not output.exists()
    assert not made[0].exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--probe", "0"], "error: --probe: expected at least 1 prompt, got 0"),
        (["--probe", "--dry-run"], "error: --probe: expected it without --dry-run, got both"),
        *(
            (
                ["--probe", "--method", method],
                f"error: --probe: expected a method whose rewards follow from the vote, which is what a probe judges, got {method}",
            )
            for method, row in METHODS.items()
            if row.reads == "nothing"
        ),
    ],
)
def test_refused(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*flags, "--output", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
