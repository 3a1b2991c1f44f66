"""Equality on tables and on real gold answers, as an equivalence, and the majority vote against a plain one."""

from __future__ import annotations

import itertools
import json
import random
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vote_cases import CLASSES, PAIRS

from mgrpo_kernels._math_worker import MathWorker
from mgrpo_kernels.vote import Vote, answers_equal, extract_answer, majority_vote
from mgrpo_kernels.vote.keys import canonical_key

REPO = Path(__file__).resolve().parents[1]
DATA = REPO.parent / "shared" / "data"


@pytest.fixture
def no_worker(monkeypatch):
    """Every question to the worker is an error."""

    def evaluate(self, formula, seconds=None):
        raise AssertionError(f"the worker was asked about {formula!r}")

    monkeypatch.setattr(MathWorker, "evaluate", evaluate)


# --- The tables


@pytest.mark.parametrize("kind", CLASSES)
def test_classes_of_each_kind(no_worker, kind):
    """All spellings of a class are equal, and no two classes are."""
    spelled = [(spelling, number) for number, each in enumerate(CLASSES[kind]) for spelling in each]
    wrong = [
        (a, b, one == two)
        for (a, one), (b, two) in itertools.combinations(spelled, 2)
        if a != b and answers_equal(a, b) != (one == two)
    ]
    assert not wrong


@pytest.mark.parametrize("a, b, equal", PAIRS)
def test_single_pairs(no_worker, a, b, equal):
    assert answers_equal(a, b) == answers_equal(b, a) == equal


def test_the_tables_are_large():
    sizes = [len(set(each)) for kind in CLASSES.values() for each in kind]
    assert sum(n * (n - 1) // 2 for n in sizes) > 1000


def test_pairs_of_the_shared_data(no_worker):
    file = DATA / "answers" / "pairs.jsonl"
    if not file.is_file():
        pytest.skip("the folder shared/data/answers is absent")
    rows = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
    assert len(rows) == 248
    wrong = [
        row
        for row in rows
        if not answers_equal(row["a"], row["b"]) == answers_equal(row["b"], row["a"]) == row["equal"]
    ]
    assert not wrong


SPELLINGS = st.sampled_from(sorted({spelling for kind in CLASSES.values() for each in kind for spelling in each}))
ANSWERS = SPELLINGS | st.text(alphabet="0123456789.,/+-% _{}^\\fractexy=()[]", min_size=1, max_size=12)


@given(ANSWERS, ANSWERS, ANSWERS)
@settings(max_examples=400, deadline=None)
def test_equality_is_an_equivalence(a, b, c):
    assert answers_equal(a, a) == bool(a.strip())
    assert answers_equal(a, b) == answers_equal(b, a)
    if answers_equal(a, b) and answers_equal(b, c):
        assert answers_equal(a, c)


@given(st.lists(ANSWERS | st.none(), min_size=1, max_size=8), st.randoms())
@settings(max_examples=200, deadline=None)
def test_the_vote_is_invariant_under_permutation(answers, random):
    """Each rollout has the same share, and each cluster the same members; only ties follow the order."""
    order = list(range(len(answers)))
    random.shuffle(order)
    vote, other = (majority_vote(each, len(answers)) for each in (answers, [answers[i] for i in order]))
    assert other.share.tolist() == vote.share.tolist()
    assert other.cluster_share.tolist() == [vote.cluster_share.tolist()[i] for i in order]
    clusters = [vote.cluster.tolist()[i] for i in order]
    assert len(set(zip(clusters, other.cluster.tolist(), strict=True))) == len(set(clusters))


# --- answers_equal


def golds() -> list[str]:
    """Every distinct gold answer of the real data."""
    if not DATA.is_dir():
        pytest.skip("the folder shared/data with gsm8k and math-ttt is absent")
    answers = []
    for split in ("train", "test"):
        with (DATA / "gsm8k" / f"{split}.jsonl").open(encoding="utf-8") as file:
            answers += [json.loads(line)["answer"].split("####")[1].strip() for line in file]
    for name in ("math", "amc", "aime"):
        answers += [row["answer"] for row in json.loads((DATA / "math-ttt" / f"{name}.json").read_text("utf-8"))]
    return list(dict.fromkeys(answers))


def plain_value(gold: str) -> Fraction | None:
    """A gold answer's value where it is an integer or a decimal: by other means than the library's."""
    digits = gold.replace(",\\!", "").replace(" ", "")
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+|-?\d*\.?\d+", digits):
        return Fraction(digits.replace(",", ""))
    return None


def as_stated(gold: str) -> list[str]:
    """Responses that state the gold answer."""
    return [
        f"So the sum is $\\boxed{{{gold}}}$.",
        f"\\fbox{{ {gold} }}",
        f"Because of that.\n#### {gold}",
        f"#### {gold}.\n",
        f"A: {gold}",
        f"**Answer:** **{gold}**",
        f"The answer is ${gold}$.",
    ]


def spellings(gold: str) -> list[str]:
    """Other usual ways to write the gold answer."""
    found = [
        f"${gold}$",
        f"\\({gold}\\)",
        f"{gold}.",
        f" {gold} ",
        f"\\boxed{{{gold}}}",
        gold.replace("\\frac", "\\dfrac"),
        gold.replace("\\frac", "\\tfrac"),
        re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", gold),
        re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", gold),
        gold.replace("^\\circ", ""),
        gold.replace("^\\circ", " degrees"),
        gold.replace("\\$", "$"),
        re.sub(r"\\(text|mbox)\{([^}]*)\}", r"\2", gold),
        re.sub(r"_(\d)$", r"_{\1}", gold),
        re.sub(r"(?<!\\cot) ", "", gold),
    ]
    if "\\text" not in gold:
        brackets = re.sub(r"\\(left|right) ?", "", gold)
        found += [brackets, re.sub(r"([)\]])", r"\\right\1", re.sub(r"([(\[])", r"\\left\1", brackets))]
        found += [brackets.replace("(", "( ").replace(")", " )")]
    value = plain_value(gold)
    if value is not None:
        number = f"{Decimal(value.numerator) / Decimal(value.denominator):f}"
        sign, size = ("-", number[1:]) if value < 0 else ("", number)
        found += [number, f"{number}0" if "." in number else f"{number}.0", f"{sign}0{size}", f"{sign}\\${size}"]
        found += [f"\\text{{{number}}}", f"{number} dollars", f"{number}\\text{{ cm}}^2"]
        found += [f"${number}", f"{number}^\\circ", f"{number} m/s", f"{number}/1", f"\\frac{{{number}}}{{1}}"]
        found += [str(value), f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"]
        if value.denominator == 1:
            grouped = f"{int(value):,}"
            found += [grouped, *(grouped.replace(",", comma) for comma in (",\\!", "{,}", "\\,", " "))]
    return found


def test_every_gold_answer_equals_itself(no_worker):
    """In any spelling, from either side, and without math-verify."""
    for gold in golds():
        stated = [extract_answer(text) for text in as_stated(gold)]
        for answer in stated + spellings(gold):
            assert answers_equal(gold, answer), (gold, answer)
            assert answers_equal(answer, gold), (answer, gold)


def test_different_plain_golds_differ(no_worker):
    """All pairs of the integers and decimals in the data, against their values."""
    values = {gold: value for gold in golds() if (value := plain_value(gold)) is not None}
    assert len(values) > 1000
    for (a, one), (b, two) in itertools.combinations(values.items(), 2):
        assert answers_equal(a, b) == (one == two), (a, b)


def test_different_golds_differ():
    """A sample of all pairs that are not plain numbers."""
    answers = golds()
    others = [gold for gold in answers if plain_value(gold) is None]
    rng = random.Random(0)
    pairs = rng.sample(list(itertools.combinations(others, 2)), 150)
    pairs += [(gold, rng.choice(answers)) for gold in others]
    really_equal = {
        frozenset(pair)
        for pair in [
            ("1,-2", "-2,1"),
            ("2 \\sqrt{5}", "2\\sqrt{5}"),
            ("\\frac{1}{4}", "\\frac14"),
            ("36^\\circ", "\\$36"),
        ]
    }
    for a, b in pairs:
        if a != b and plain_value(b) is None:
            assert answers_equal(a, b) == (frozenset((a, b)) in really_equal), (a, b)


@pytest.mark.parametrize(
    "a, b",
    [
        ("144", "144.0"),
        ("25", "025"),
        (r"\frac32", "1.5"),
        ("1/2", "0.5"),
        ("1/2", r"\frac12"),
        (r"\dfrac{1}{2}", r"\tfrac 12"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"),
        (r"-\frac{1}{2}", "-.5"),
        (r"1\frac{4}{5}", "9/5"),
        ("1 4/5", "1.8"),
        (r"50\%", "0.5"),
        ("50%", "50 percent"),
        ("1,000", "1000"),
        ("1{,}000", "1 000"),
        ("2.5 million", "2,500,000"),
        (r"2.5 \text{ million}", "2500000"),
        ("2 dozen", "24"),
        (r"(\frac32, 5)", r"\left( \dfrac{3}{2}, 5 \right)"),
        ("$18", "18 dollars"),
        ("€ 5", "5"),
        ("60 km/h", "60"),
        (r"5\text{ m}", "5"),
        (r"\text{5 cm}", "5"),
        (r"\mathbf{12}", "12.0"),
        ("12 hours.", "12"),
        ("−5", "-5"),  # noqa: RUF001 - the minus sign
        ("- 5", "-5"),
        ("{144}", "144"),
        ("90°", r"90^{\circ}"),
        ("π", r"\pi"),
        ("pi", r"\pi"),
        ("√5", r"\sqrt{5}"),
        ("3 sqrt(13)", r"3\sqrt{13}"),
        ("52_8", "52_{8}"),
        ("52_8", "42"),
        (r"6.72 \times 10^{-5}", ".0000672"),
        ("6.72e-05", r"6.72 \cdot 10^-5"),
        ("1.5 * 10^3", "1,500"),
        ("1.5 × 10^3", "1,500"),  # noqa: RUF001 - the sign, not the letter
        (r"\text{Evelyn}", "evelyn"),
        (r"\text{(C)}", "C"),
        ("(C)", r"\textbf{(C)}"),
        ("10 a.m.", r"10 \text{ AM}"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_equal(no_worker, a, b):
    assert answers_equal(a, b)
    assert answers_equal(b, a)


@pytest.mark.parametrize(
    "a, b",
    [
        ("1/3", "0.333333"),
        ("0.1", "0.10000000000000001"),
        ("1 4/5", "14/5"),
        ("2 million", "2"),
        (r"2 \text{ million}", "2"),
        (r"50\%", "5"),
        (r"50\%", r"0.5\%"),
        ("listen", "silent"),
        (r"\text{listen}", "silent"),
        ("Evelyn", "5"),
        ("10 am", "10 pm"),
        (r"10 \text{ am}", r"10 \text{ pm}"),
        ("52_8", "52"),
        ("9" * 5000, "9" * 4999 + "8"),
        ("x" * 300, "x^{300}"),
        ("$", "$$"),
        ("5", ""),
        ("5", "  "),
        ("5", None),
        (None, None),
        ("", ""),
    ],
)
def test_different(no_worker, a, b):
    assert not answers_equal(a, b)
    assert not answers_equal(b, a)


@pytest.mark.parametrize(
    "a, b",
    [
        ("5", r"\sqrt{25}"),
        ("(a+5)(b+2)", "ab + 2a + 5b + 10"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
        ("x=5", "5"),
        (r"(2,\infty)", "x > 2"),  # math-verify says so from one side only
        ("1,-2", "-2, 1"),
        (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt 3}"),
        (
            r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
            r"\begin{bmatrix}-\frac13\\\frac{2}{3}\\\frac{5}{3}\end{bmatrix}",
        ),
    ],
)
def test_equal_formulas(a, b):
    assert answers_equal(a, b)
    assert answers_equal(b, a)


@pytest.mark.parametrize(
    "a, b",
    [
        ("(1,2)", "(2,1)"),
        ("(3,4)", "(3,4]"),
        ("1/0", "2"),
        ("1 or 2", "1"),
        ("5 xy", "5"),
        ("x+1", "x-1"),
        ("}{", r"\frac"),
    ],
)
def test_different_formulas(a, b):
    assert not answers_equal(a, b)
    assert not answers_equal(b, a)


def numbers_spelled() -> st.SearchStrategy[tuple[Fraction, str]]:
    integers = st.integers(-(10**6), 10**6)

    def spell(n: int, d: int, way: int) -> tuple[Fraction, str]:
        value, sign = Fraction(n, d), "-" if n < 0 else ""
        ways = [f"{n}/{d}", f"\\frac{{{n}}}{{{d}}}", f"{sign}\\dfrac{{{abs(n)}}}{{{d}}}"]
        ways += [f"{sign}{abs(n) // d} \\frac{{{abs(n) % d}}}{{{d}}}", f"{sign}{abs(n) // d} {abs(n) % d}/{d}"]
        if d in (1, 2, 4, 5, 10):
            ways += [f"{n / d:.4f}", f"{n / d:,.2f}"]
        return value, ways[way % len(ways)]

    return st.builds(spell, integers, st.integers(1, 12), st.integers(0, 100))


@given(numbers_spelled(), numbers_spelled())
@settings(max_examples=300, deadline=None)
def test_plain_numbers_are_equal_if_their_values_are(one, two):
    assert answers_equal(one[1], two[1]) == (one[0] == two[0])
    assert answers_equal(one[1], str(one[0]))


@given(st.text(alphabet="0123456789.,/+-% _{}^\\fractex$()", max_size=30) | st.text())
@settings(max_examples=500, deadline=None)
def test_any_answer_has_a_key(text):
    assert canonical_key(text) == canonical_key(f" {text} ")


@pytest.mark.parametrize(
    "text", [r"x\sqrt{-2} \le 3\sqrt{-2}", r"ai \ge \sqrt{-2}", r"\pi > x+\sqrt{-2}", r"-\sqrt{-2} < 2x"]
)
def test_an_inequality_of_complex_numbers_has_a_key(text):
    assert canonical_key(text) == canonical_key(f" {text} ")


def test_exact_and_own_equivalence():
    assert answers_equal("5", "5", "exact")
    assert not answers_equal("5", "5.0", "exact")
    assert answers_equal("5", "6", lambda a, b: abs(int(a) - int(b)) < 2)


def test_equality_errors():
    with pytest.raises(ValueError, match="equivalence: expected one of math, exact, got 'near'"):
        answers_equal("1", "2", "near")
    with pytest.raises(TypeError, match="equivalence: expected 'math', 'exact' or a function, got int"):
        answers_equal("1", "2", 3)
    with pytest.raises(TypeError, match="equivalence: expected a function that returns a bool, got NoneType"):
        answers_equal("1", "2", lambda a, b: None)
    with pytest.raises(TypeError, match="b: expected a string or None, got int"):
        answers_equal("1", 2)


# --- majority_vote


def test_vote(no_worker):
    vote = majority_vote(["1/2", "3", None, "0.5", "", "4", "4.0", "5"], 4)
    assert vote.labels == ["1/2", "4"]
    assert vote.share.tolist() == pytest.approx([2 / 3, 2 / 3])
    assert vote.cluster.tolist() == [0, 1, -1, 0, -1, 0, 0, 1]
    assert vote.cluster_share.tolist() == pytest.approx([2 / 3, 1 / 3, 0, 2 / 3, 0, 2 / 3, 2 / 3, 1 / 3])
    assert vote.agrees.tolist() == [1, 0, 0, 1, 0, 1, 1, 0]
    assert [field.dtype for field in vote[1:]] == [torch.float32, torch.int64, torch.float32, torch.float32]
    assert Vote._fields == ("labels", "share", "cluster", "cluster_share", "agrees")


def test_ties_go_to_the_voters_answer_that_came_first():
    assert majority_vote(["2", "1", "1", "2"], 4).labels == ["2"]
    assert majority_vote(["2", "1", "1", "2"], 4, voters=[False, True, True, True]).labels == ["1"]
    tied = majority_vote(["2", "1", "2"], 3, voters=[False, True, True])
    assert tied.labels == ["1"]  # one vote each, and the voter for 1 came first
    assert tied.cluster.tolist() == [0, 1, 0]
    assert tied.agrees.tolist() == [0, 1, 0]


def test_everybody_is_scored():
    voters = torch.tensor([False, False, True, True, False])
    vote = majority_vote(["7", "7", "5", "5.0", "5"], 5, voters=voters)
    assert vote.labels == ["5"]
    assert vote.share.tolist() == [1.0]
    assert vote.cluster.tolist() == [0, 0, 1, 1, 1]
    assert vote.cluster_share.tolist() == [0, 0, 1, 1, 1]
    assert vote.agrees.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "answers",
    [
        ["50%", "50", "0.5"],
        [r"\{1,2\}", "(1,2)", "(2,1)"],
        ["5 m", "5", "5 km", r"\sqrt{25}"],
        ["1, 2", r"\{2,1\}", r"\pm 1", "-1,1"],
    ],
)
def test_the_order_of_the_rollouts_makes_no_difference(answers):
    """Shares and rewards, rollout by rollout, are those of any other order."""
    of_answer = {}
    for order in itertools.permutations(answers):
        vote = majority_vote(order, len(order))
        for answer, share in zip(order, vote.cluster_share.tolist(), strict=True):
            assert of_answer.setdefault(answer, share) == share


def test_nobody_answers():
    for vote in (
        majority_vote([None, "", "  "], 3),
        majority_vote(["1", "1", "2"], 3, voters=[False] * 3),
    ):
        assert vote.labels == [None]
        assert vote.share.tolist() == [0]
        assert vote.cluster_share.tolist() == [0, 0, 0]
        assert vote.agrees.tolist() == [0, 0, 0]


def test_min_share():
    answers = ["1", "1", "2", "3", None]
    assert majority_vote(answers, 5, min_share=0.4).labels == ["1"]  # 2 of 5 voters, one of whom has no answer
    vote = majority_vote(answers, 5, min_share=0.41)
    assert vote.labels == [None]
    assert vote.share.tolist() == [0.5]
    assert vote.cluster_share.tolist() == [0.5, 0.5, 0.25, 0.25, 0]
    assert vote.agrees.tolist() == [0] * 5
    assert majority_vote(["1"], 1, min_share=1.0).labels == ["1"]
    assert majority_vote([None], 1).labels == [None]


def test_one_answer_of_many_is_no_majority():
    answers = [None] * 31 + ["7"]
    vote = majority_vote(answers, 32, min_share=0.9)
    assert vote.labels == [None]
    assert vote.share.tolist() == [1.0]  # of those who answered
    assert majority_vote(answers, 32, voters=[False] * 31 + [True], min_share=0.9).labels == ["7"]  # only voters count


def test_min_votes():
    answers = ["1", "2", "3", "4", "5", "5", "6", "7"]
    vote = majority_vote(answers, 4, min_votes=2)
    assert vote.labels == [None, "5"]
    assert vote.agrees.tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert majority_vote(answers, 4, min_votes=3).labels == [None, None]


def test_groups_of_any_size():
    for dtype in (torch.int32, torch.int64):
        vote = majority_vote(["1", "2", "2"], torch.tensor([0, 0, 1, 3, 3], dtype=dtype))
        assert vote.labels == [None, "1", "2", None]
        assert vote.share.tolist() == [0, 1, 1, 0]
        assert vote.cluster.tolist() == [0, 0, 0]
    empty = majority_vote([], 4)
    assert empty.labels == []
    assert [tuple(field.shape) for field in empty[1:]] == [(0,)] * 4
    assert empty.cluster.dtype == torch.int64
    assert majority_vote([], torch.tensor([0, 0])).labels == [None]


def test_own_equivalence_sees_the_first_of_the_cluster_and_the_new_answer():
    asked = []

    def near(first: str, new: str) -> bool:
        asked.append((first, new))
        return abs(int(first) - int(new)) <= 1

    vote = majority_vote(["5", "6", "7", "7", "4"], 5, equivalence=near)
    assert vote.cluster.tolist() == [0, 0, 1, 1, 0]
    assert vote.labels == ["5"]
    assert asked == [("5", "6"), ("5", "7"), ("5", "4")]


def plain_vote(answers, size, voters, min_share):
    """The vote once more, in the plainest words."""
    labels, share, cluster, cluster_share, agrees = [], [], [], [], []
    for start in range(0, len(answers), size):
        group, votes = answers[start : start + size], voters[start : start + size]
        counted = [a for a, v in zip(group, votes, strict=True) if v and a]
        best = max(counted, key=lambda a: (counted.count(a), -counted.index(a)), default=None)
        top = counted.count(best) / len(counted) if counted else 0.0
        label = best if counted and counted.count(best) / sum(votes) >= min_share else None
        labels.append(label)
        share.append(top)
        seen = list(dict.fromkeys(a for a in group if a))
        cluster += [seen.index(a) if a else -1 for a in group]
        cluster_share += [counted.count(a) / len(counted) if a and counted else 0.0 for a in group]
        agrees += [float(bool(a) and a == label) for a in group]
    return labels, share, cluster, cluster_share, agrees


@given(st.data(), st.integers(1, 6), st.integers(0, 4), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
@settings(max_examples=200, deadline=None)
def test_against_the_plain_vote(data, size, prompts, min_share):
    B = size * prompts
    answers = data.draw(st.lists(st.sampled_from([None, "", "1", "2", "3"]), min_size=B, max_size=B))
    voters = data.draw(st.lists(st.booleans(), min_size=B, max_size=B))
    want = plain_vote(answers, size, voters, min_share)
    for equivalence in ("exact", "math"):
        vote = majority_vote(answers, size, voters=voters, equivalence=equivalence, min_share=min_share)
        assert vote.labels == want[0]
        assert vote.cluster.tolist() == want[2]
        for got, numbers in zip(
            (vote.share, vote.cluster_share, vote.agrees), (want[1], want[3], want[4]), strict=True
        ):
            assert got.tolist() == pytest.approx(numbers)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        (("12", 1), {}, TypeError, "answers: expected a sequence of strings and None, got str"),
        ((5, 1), {}, TypeError, "answers: expected a sequence of strings and None, got int"),
        ((["1", 2], 1), {}, TypeError, "answers: expected strings and None, got int at 1"),
        ((["1"] * 4, 3), {}, ValueError, "groups: expected a group size >= 1 that divides the 4 rollouts, got 3"),
        ((["1"], 0), {}, ValueError, "groups: expected a group size >= 1"),
        ((["1"], 1.0), {}, TypeError, r"groups: expected an int or int offsets \(P\+1,\), got float"),
        ((["1"], torch.tensor([0.0, 1.0])), {}, TypeError, "groups: expected dtype int32 or int64, got float32"),
        (
            (["1"] * 3, torch.tensor([0, 2])),
            {},
            ValueError,
            r"groups: expected ascending offsets from 0 to 3, got \[0, 2\]",
        ),
        ((["1"] * 3, torch.tensor([0, 3, 2, 3])), {}, ValueError, "groups: expected ascending offsets from 0 to 3"),
        ((["1"], 1), {"voters": torch.tensor([1])}, TypeError, "voters: expected dtype bool, got int64"),
        ((["1"], 1), {"voters": torch.tensor([True, True])}, ValueError, r"voters: expected shape \(1,\), got \(2,\)"),
        (
            (["1"], 1),
            {"voters": [True, True]},
            ValueError,
            "voters: expected one bool for each of the 1 answers, got 2",
        ),
        ((["1"], 1), {"voters": [1]}, TypeError, r"voters\[0\]: expected a bool, got int"),
        ((["1"], 1), {"voters": True}, TypeError, "voters: expected a bool tensor or a sequence of bools, got bool"),
        ((["1"], 1), {"equivalence": "near"}, ValueError, "equivalence: expected one of math, exact, got 'near'"),
        (
            (["1"], 1),
            {"equivalence": None},
            TypeError,
            "equivalence: expected 'math', 'exact' or a function, got NoneType",
        ),
        ((["1", "2"], 2), {"equivalence": lambda a, b: 1}, TypeError, "a function that returns a bool, got int"),
        ((["1"], 1), {"min_share": 1.5}, ValueError, "min_share: expected at least 0.0 and at most 1.0, got 1.5"),
        ((["1"], 1), {"min_share": float("nan")}, ValueError, "min_share: expected a finite number"),
        ((["1"], 1), {"min_votes": 0}, ValueError, "min_votes: expected at least 1, got 0"),
        ((["1"], 1), {"seconds": -1}, ValueError, "seconds: expected at least 0.0, got -1"),
        ((["1"], 1), {"min_share": "half"}, TypeError, "min_share: expected a number, got str"),
    ],
)
def test_vote_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        majority_vote(*arguments, **options)
