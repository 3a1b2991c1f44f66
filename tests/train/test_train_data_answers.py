"""How a run reads answers: --answer-from, --answer-pattern, --answer-extractor and --answer-kind, and the warning where it finds none."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny

from mgrpo_kernels.train.data.answers import describe_extractor, make_extractor
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.watch.guard import START, WINDOW, Guard
from mgrpo_kernels.train.watch.unanswered import warn_of_answers
from mgrpo_kernels.vote.extraction import is_number, read_answers

TEXT = "#### 5\nThe answer is 6.\nSo 3 + 4 = 7 and 8 more"


def options(**changes: Any) -> Any:
    return tiny.config(**changes).data


@pytest.mark.parametrize(
    "changes, text, answer",
    [
        ({}, TEXT, "5"),
        ({}, "59 + 63 = 122.", "122"),
        ({"answer_from": "boxed"}, TEXT, None),
        ({"answer_from": "boxed"}, r"\boxed{9} or 4", "9"),
        ({"answer_from": "phrase"}, "The answer is 6.", "6"),
        ({"answer_from": "phrase"}, "59 + 63 = 122.", None),
        ({"answer_from": "last-number"}, TEXT, "8"),
        ({"answer_from": "last-number"}, r"\boxed{9} or $1,234.50, I think", "1,234.50"),
        ({"answer_from": "last-number"}, "none", None),
        ({"answer_pattern": r"= (\d+)"}, "1 = 2, 3 = 45 apples", "45"),
        ({"answer_pattern": r"(?:<<)\d+"}, "<<1 and <<2", "<<2"),
        ({"answer_pattern": r"x(\d)?"}, "x", None),
        ({"answer_kind": "number"}, r"\boxed{59+63}", None),
        ({"answer_kind": "number"}, r"\boxed{122}", "122"),
        ({"answer_kind": "number"}, r"\boxed{Paris}", None),
        ({"answer_extractor": "shout:last_word"}, "it is OVER", "over"),
    ],
)
def test_where_answers_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], text: str, answer: str | None
) -> None:
    (tmp_path / "shout.py").write_text("def last_word(text):\n    return text.split()[-1].lower()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert make_extractor(options(**changes))(text) == answer
    assert describe_extractor(options(**changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"answer_pattern": "("}, "answer_pattern: expected a regular expression of Python's, got '\\('"),
        ({"answer_pattern": "(a)(b)"}, "answer_pattern: expected at most one group, which is the answer, got 2"),
        (
            {"answer_extractor": "no.such:f"},
            "answer_extractor: expected module:function that can be imported, got 'no.such:f'",
        ),
        ({"answer_extractor": "json"}, "answer_extractor: expected module:function that can be imported, got 'json'"),
        ({"answer_extractor": "math:pi"}, "answer_extractor: expected a function, got float at 'math:pi'"),
        (
            {"answer_pattern": "a", "answer_from": "boxed"},
            "answer_pattern: expected one of --answer-from, --answer-pattern and",
        ),
    ],
)
def test_options_that_cannot_be_used(changes: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_extractor(options(**changes))


def test_an_extractor_that_returns_no_text() -> None:
    with pytest.raises(UsageError, match="answer_extractor: expected builtins:len to return a string or None, got int"):
        make_extractor(options(answer_extractor="builtins:len"))("abc")


@pytest.mark.parametrize(
    "text",
    [
        "122",
        "-3.5",
        "x = 5",
        r"\frac34",
        "3/4",
        "1,234",
        "12 cm",
        "$5",
        "50%",
        "3 x 10^8",
        "2.5 million",
        "7 apples",
        "1e-3",
        "10^6",
    ],
)
def test_numbers(text: str) -> None:
    assert is_number(text)


@pytest.mark.parametrize(
    "text", ["59+63", "2*3", "10 - 4", "3!", r"\sqrt{4}", "2^3", "x", "Paris", "1, 2", "(1,2)", "x^2", "2x"]
)
def test_what_is_no_number(text: str) -> None:
    assert not is_number(text)


def test_only_a_cut_response_loses_an_open_ended_answer() -> None:
    extract = make_extractor(options(answer_from="last-number"))
    assert read_answers(extract, ["it is 2", "it is 2", r"it is 2."], [True, False, False]) == ["2", None, None]


# --- Where no answers are found


def test_responses_without_answers_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    texts = ["I am not sure", "let us see", "well", "it is 4"]
    with caplog.at_level(logging.WARNING, logger="mgrpo_kernels"):
        assert warn_of_answers(texts, [None, None, None, "4"], ["p"] * 2, ["4", None])
    assert "no answer was found in 3 of 4 responses" in caplog.text
    assert "'I am not sure'; 'let us see'; 'well'" in caplog.text
    for option in (
        "--prompt-template",
        "--answer-from",
        "--answer-pattern",
        "--answer-extractor",
        "--max-response-tokens",
    ):
        assert option in caplog.text


def test_one_label_for_most_prompts_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    prompts, answers = list("abcdef"), ["Conclusion"] * 4 + ["1", "2"]
    with caplog.at_level(logging.WARNING, logger="mgrpo_kernels"):
        assert warn_of_answers([f"#### {each}" for each in answers], answers, prompts, answers)
    assert "'Conclusion' is the label of 4 of 6 prompts" in caplog.text
    assert caplog.text.count("'#### Conclusion'") == 3


def test_a_healthy_step_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    answers = ["1", "2", "1", "2", "3", None]
    with caplog.at_level(logging.WARNING, logger="mgrpo_kernels"):
        assert not warn_of_answers(["text"] * 6, answers, list("abcdef"), answers)
        assert not warn_of_answers(["text"] * 3, ["1"] * 3, ["a", "b", "c"], ["1"] * 3)  # too few prompts to tell
    assert not caplog.text


def guard_says(lines: list[dict[str, float]]) -> list[str]:
    guard, said = Guard(0, 0), []
    for step, line in enumerate(lines, 1):
        said += guard.look({"step": step, **line})
    return said


def test_the_guard_knows_a_run_without_answers() -> None:
    nothing = {"unparsed_fraction": 1.0, "groups_with_signal": 0.0}
    assert any("share of responses without an answer" in sign for sign in guard_says([nothing] * (START + WINDOW)))
    rare = {"unparsed_fraction": 0.95, "groups_with_signal": 0.1}
    assert len(guard_says([rare] * (START + WINDOW))) > 0  # this sign alone is enough
    healthy = {"unparsed_fraction": 0.4, "groups_with_signal": 0.6}
    assert guard_says([healthy] * 30) == []
    fewer = guard_says([healthy] * 10 + [{"unparsed_fraction": 0.7, "groups_with_signal": 0.0}] * 15)
    assert any("0.400 -> 0.7" in sign for sign in fewer)
    assert any("no advantage other than 0 in the last 10 steps" in sign for sign in fewer)
    assert (
        guard_says([healthy] * 10 + [{"unparsed_fraction": 0.7, "groups_with_signal": 0.5}] * 15) == []
    )  # one sign alone
