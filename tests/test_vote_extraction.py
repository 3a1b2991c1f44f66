"""Finding the answer in a response: the order of the markers, where a value ends, and what is no answer."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vote_cases import TEXTS

from mgrpo_kernels.vote import answers_equal, extract_answer, majority_vote
from mgrpo_kernels.vote.extraction import closed_answer

TEXTS_FILE = Path(__file__).resolve().parents[2] / "shared" / "data" / "answers" / "texts.jsonl"


def same(found: str | None, answer: str | None) -> bool:
    return found is None if answer is None else found is not None and answers_equal(found, answer)


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{x^{2^{3}}}", "x^{2^{3}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\fbox{7}", "7"),
        (r"\boxed 5", "5"),
        (r"It is $\boxed 5$.", "5"),
        (r"It is \(\boxed 5\).", "5"),
        ("\\boxed\n{8}", "8"),
        (r"\boxed{5.}", "5"),
        (r"\boxed{ $5$ }", "5"),
        (r"} \boxed{5} {", "5"),
        (r"\boxed{5} \boxed{6", "5"),  # cut off: the last box that is closed
        (r"\boxed{6", "6"),
        (r"\boxed{6 #### 4", "4"),
        (r"\boxed{5} #### 4", "5"),
        (r"#### 4 \boxed{5} the answer is 3", "5"),
        (r"\boxedx{3}", None),
        (r"\boxed{}", None),
        (r"\boxed{ } #### 4", "4"),
        ("#### 1,000\nQ: next", "1,000"),
        ("####5\n#### 6.", "6"),
        ("#### 5 #### 6", "6"),
        ("#### $18", "$18"),
        ("#### **-3.5**", "-3.5"),
        ("#### 4\nthe answer is 3", "4"),
        ("####", None),
        ("##### A heading", None),
        ("A: 5", "5"),
        ("a: 5.", "5"),
        ("Q: 2+3? A: 7 apples. Good.", "7"),
        ("A: 1\nA: 2", "2"),
        ("A: 1\nthe answer is 2", "2"),
        ("the answer is 2\nA: 1", "1"),
        ("The answer is 3.5.", "3.5"),
        ("THE ANSWER IS 3.5", "3.5"),
        ("the answer is: **42**.", "42"),
        ("**Answer:** 12", "12"),
        ("**A: 5**", "5"),
        ("the answer is 5. No, the answer is 6.", "6"),
        ("The answer is 5\n\nThe answer is ", "5"),
        ("The answer is $\\frac12$.", r"\frac12"),
        ("The answer is \\(x=5\\).", "x=5"),
        ("The answer is \\[ 3 \\]", "3"),
        ("the answer is 1.5. So", "1.5"),
        ("NASA: 5", None),
        ("the answer isn't known", None),
        ("A: ", None),
        ("", None),
        ("nothing of the kind: 5", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_extract_answer_wants_a_string():
    with pytest.raises(TypeError, match="text: expected a string, got NoneType"):
        extract_answer(None)


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 20_000,
        r"\boxed{" * 20_000 + "}" * 20_000,
        r"\boxed{" + "." * 20_000 + "}",
        r"\boxed " * 20_000,
        "A: . " * 20_000,
        "the answer is " * 20_000,
        "####" * 20_000,
        "A: " + "$" * 20_001,
        "answer" + " " * 20_000,
        "the answer is 4" + "." * 200_000,
        "A: x\n" * 20_000,
        "answer to the question " * 20_000,
        "1=" * 20_000,
    ],
    ids=lambda text: text[:9],
)
def test_extraction_is_linear_in_a_degenerate_text(text):
    start = time.monotonic()
    extract_answer(text)
    assert time.monotonic() - start < 2.0  # takes 0.03 s; a quadratic search takes minutes


@given(st.text(alphabet="\\boxed{}$#*. \nA:answer is1", max_size=80))
@settings(max_examples=300, deadline=None)
def test_extraction_takes_any_text(text):
    answer = extract_answer(text)
    assert answer is None or (answer == answer.strip() and answer)


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_of_each_kind(kind):
    wrong = [
        (text, answer, extract_answer(text)) for text, answer in TEXTS[kind] if not same(extract_answer(text), answer)
    ]
    assert not wrong


def test_texts_of_the_shared_data():
    if not TEXTS_FILE.is_file():
        pytest.skip("the folder shared/data/answers is absent")
    rows = [json.loads(line) for line in TEXTS_FILE.read_text("utf-8").split("\n") if line]
    assert len(rows) == 45
    wrong = [(row, extract_answer(row["text"])) for row in rows if not same(extract_answer(row["text"]), row["answer"])]
    assert not wrong


@pytest.mark.parametrize(
    "template",
    [
        "We add.\n#### Conclusion\nSo it is {n} in the end, as you see.",
        "#### Step 1: add\nWe get {n} from it.",
        "I have found {n}. The answer is as follows.",
        "So we have {n} there. The answer is correct.",
    ],
)
def test_a_text_that_all_responses_share_is_no_answer(template):
    """It would elect itself with every vote, whatever the responses say."""
    answers = [extract_answer(template.format(n=n)) for n in (41, 42, 43, 42)]
    assert majority_vote(answers, 4).labels == [None]


def test_a_vote_over_a_sentence_after_the_answer_reflects_the_numbers():
    text = "Answer: {n}. We check that the answer is correct."
    vote = majority_vote([extract_answer(text.format(n=n)) for n in (41, 42, 43, 42)], 4)
    assert vote.labels == ["42"]
    assert vote.share.tolist() == [0.5]
    assert vote.agrees.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "text, answer",
    [
        ("So, the final answer is 2", None),  # of 262
        ("So, the final answer is 12.", None),  # of 12.5
        ("The answer is 12. So", "12"),
        ("\\boxed{2", None),
        ("\\boxed{26}", "26"),
        ("\\boxed{26} and 3", "26"),
        ("#### 26", None),
        ("#### 26\n", "26"),
        ("26", None),
        ("2 + 24 = 26", None),
        ("nothing", None),
    ],
)
def test_a_cut_response_has_no_open_ended_answer(text, answer):
    assert closed_answer(extract_answer, text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 42, since 6 * 7 = 42.", "42"),
        ("The answer is 1,234, since it is.", "1,234"),
        ("The answer is (1,2), as shown.", "(1,2)"),
        ("The answer is $0.5$, since", "0.5"),
        ("Answer: 0.5;", "0.5"),
        ("The answer is 3: see above", "3"),
        ("The answer is 5 - see above", "5"),
    ],
)
def test_the_text_of_an_answer_ends_without_the_punctuation_after_it(text, answer):
    """Votes by exact text compare it as it is."""
    assert extract_answer(text) == answer
