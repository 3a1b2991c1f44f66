"""Where a response spells its answer, and which tokens do."""

from __future__ import annotations

import pytest
import torch

from mgrpo_kernels.method import answer_tokens
from mgrpo_kernels.vote.extraction import answer_place

PLACES = [  # the answer's place is in angle quotes
    "1+2=3, so 3 is right.\n#### «3»",
    "So \\boxed{«7»}. I checked 7 twice.",
    "first \\boxed{1}, then \\boxed{«\\frac{3}{4}»}",
    "The answer is «42», since 6*7=42",
    "The answer is «42». The answer was checked.",
    "13 + 29 = «42»",
    "6 + 1 = 7, so x = «7»",
    "#### 15 - 10 = «5»",
    "12#«3»$",
    "<answer>«x^2»</answer> and x^2 again",
    "The answer is 15 or 5: the answer is «5»",
]


@pytest.mark.parametrize("marked", PLACES)
def test_the_place_is_behind_the_last_marker_that_the_answer_follows(marked: str) -> None:
    start, end = marked.index("«"), marked.index("»") - 1
    text = marked.replace("«", "").replace("»", "")
    assert answer_place(text, text[start:end]) == (start, end)


@pytest.mark.parametrize(
    ("text", "answer", "place"),
    [
        ("Sum:\nThe answer is 1,000 apples\nDone", "1000", "is 1,000 apples"),
        ("\\boxed{\\dfrac12}", "1/2", "{\\dfrac12}"),
        ("one\nis two\n", "2", "is two"),
        ("\\boxed{ \\frac {1} {2} }", "\\frac{1}{2}", "\\frac {1} {2}"),
        ("Final answer:\n\n  1e3\nbye", "1000", "1e3"),
        ("#### 5<|im_end|>\n#### 6 5", "5", "5"),
    ],
)
def test_an_answer_that_is_spelled_otherwise_is_the_line_behind_the_marker(text: str, answer: str, place: str) -> None:
    found = answer_place(text, answer)
    assert found is not None
    assert text[slice(*found)] == place
    assert found[0] == text.index(place)


@pytest.mark.parametrize("answer", ["", "  \n"])
def test_a_blank_answer_has_no_place(answer: str) -> None:
    assert answer_place("#### 3", answer) is None


def pieces_of(text: str, size: int) -> list[int]:
    return list(range((len(text) + size - 1) // size))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("marked", PLACES)
def test_every_token_that_spells_a_part_of_the_answer_and_no_other(marked: str, size: int) -> None:
    text = marked.replace("«", "").replace("»", "")
    start, end = marked.index("«"), marked.index("»") - 1
    ids = pieces_of(text, size)
    got = answer_tokens([ids], [text], [text[start:end]], lambda part: text[: len(part) * size], len(ids) + 2)
    want = [number * size < end and (number + 1) * size > start for number in ids]
    assert got.tolist() == [[*want, False, False]]


def test_responses_without_an_answer_or_without_a_token_have_no_such_token() -> None:
    texts = ["#### 3", "", "no answer"]
    got = answer_tokens([[0, 1], [], [2]], texts, ["3", "3", None], lambda part: texts[0][: 3 * len(part)], 2)
    assert got.tolist() == [[False, True], [False, False], [False, False]]


def test_tokens_that_spell_nothing_are_no_part_of_the_answer() -> None:
    spelled = ["", "#", "###", " ", "", "3", ""]
    got = answer_tokens([list(range(7))], ["#### 3"], ["3"], lambda part: "".join(spelled[i] for i in part), 7)
    assert torch.equal(got[0], torch.tensor([False, False, False, False, False, True, False]))
