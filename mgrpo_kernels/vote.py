r"""Answers: finding them in a text, telling whether two are equal, and the majority vote.

Two answers are equal as mathematics if what they say is equal: ``1/2``, ``0.5`` and ``\frac12``. Plain numbers and
plain words are decided here, exactly and in microseconds; everything else is a question to math-verify, in a process
that can be killed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import checks, sequences
from mgrpo_kernels._math_worker import MathWorker

EQUIVALENCES = ("math", "exact")
Equivalence = str | Callable[[str, str], bool]  # one of these, or a function

# Longer answers than this are no answers but ramblings, which are costly to parse: only the same text is equal to them.
_MAX_LENGTH = 256


class Vote(NamedTuple):
    """The outcome of :func:`majority_vote`; tensors are on the CPU."""

    labels: list[str | None]
    """P labels: the winner as its first voter spelled it; None if no answer parsed, or its share is below min_share."""
    share: Tensor
    """(P,) float32 in [0, 1]: the winner's share of the voters' parsed answers, 0 where there are none."""
    cluster: Tensor
    """(B,) int64: equal answers of a group share a number, from 0 in each group by first appearance; -1 for none."""
    cluster_share: Tensor
    """(B,) float32 in [0, 1]: the share of the rollout's own cluster among the voters' parsed answers."""
    agrees: Tensor
    """(B,) float32: 1 where the rollout's answer equals its group's label, else 0."""


# --- Finding the answer in a text

_BRACES = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*\{|\\.|[{}]", re.DOTALL)
# "\boxed 5" ends at a space, at the formula's end or before a comma.
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s+([^\s{}$](?:(?!\\[)\]]|[,;](?:\s|$))[^\s$])*)")
_HASHES = re.compile(r"(?<!#)####(?!#)")
_PHRASE = re.compile(r"(?<!\w)A[^\S\n]*:|\banswer[^\S\n]*(?::|is\b[^\S\n]*:?)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?=\s|\*|$)")
_IN_DOLLARS = re.compile(r"(\$\$?)([^$]*)\1")
_IN_BRACKETS = re.compile(r"\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)


def extract_answer(text: str) -> str | None:
    r"""Return the final answer that a response states, or None.

    In this order: the last ``\boxed{x}`` (``\fbox{x}`` and ``\boxed x`` too) that is closed and not empty; the last
    ``#### x``; the last ``A: x``, ``answer: x`` or ``the answer is x``, to the end of the sentence. Markdown's ``**``,
    math delimiters around the whole answer, and a full stop at its end are no part of it.

    Args:
        text: one response.

    Raises:
        TypeError: no string.
    """
    if not isinstance(text, str):
        raise TypeError(f"text: expected a string, got {type(text).__name__}")
    return (
        _last_box(text)
        or _last(_trim(rest) for rest in reversed(_after(_HASHES, text)))
        or _last(_trim(_SENTENCE_END.split(rest.lstrip("* "), 1)[0]) for rest in reversed(_after(_PHRASE, text)))
    )


def _last(from_the_end: Iterable[str]) -> str | None:
    return next((answer for answer in from_the_end if answer), None)


def _after(marker: re.Pattern[str], text: str) -> list[str]:
    """Return what follows each marker, up to the next one or the end of its line."""
    spans = [match.span() for match in marker.finditer(text)] + [(len(text), len(text))]
    return [text[end:start].split("\n", 1)[0] for (_, end), (start, _) in itertools.pairwise(spans)]


def _trim(answer: str) -> str:
    """Take spaces, a full stop, markdown's emphasis and math delimiters off both ends."""
    before = None
    while before != answer:
        before = answer
        answer = answer.strip().removeprefix("**").removesuffix("**").strip()
        if not answer.endswith(r"\right."):
            answer = answer.removesuffix(".")
        if match := _IN_DOLLARS.fullmatch(answer) or _IN_BRACKETS.fullmatch(answer):
            answer = next(group for group in reversed(match.groups()) if group is not None)
    return answer


def _last_box(text: str) -> str | None:
    """Return what the last box holds that is closed and not empty. One pass: a text of unclosed boxes costs no more."""
    open_braces: list[int | None] = []  # where a box's content starts; None for any other brace
    boxes: list[tuple[int, int]] = []  # (start, end) of its content
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "{":
            open_braces.append(None)
        elif token == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                boxes.append((start, match.start()))
        elif token.endswith("{") and len(token) > 2:  # not the two characters of an escaped brace
            open_braces.append(match.end())
    boxes += [match.span(1) for match in _BARE_BOX.finditer(text)]
    return _last(_trim(text[start:end]) for start, end in sorted(boxes, reverse=True))


# --- Telling whether two answers are equal


class _Reading(NamedTuple):
    """What an answer says, as far as it can be read without math-verify."""

    formula: str  # as math-verify gets it
    text: str  # without what makes no difference: equal texts are equal answers
    number: Fraction | None  # exact value of a plain number; a percentage's as it stands, 50 for 50%
    percent: bool
    words: str | None  # a plain word, a name or a time of day; or None


def answers_equal(a: str | None, b: str | None, equivalence: Equivalence = "math") -> bool:
    r"""Return whether two answers are equal; None and empty answers are equal to nothing.

    As mathematics ("math"): plain numbers by exact value, in any spelling (``1/2``, ``0.5``, ``\frac12``, ``1{,}000``,
    ``2.5 million``), where units and currency signs do not count, and a percentage equals both its number and its
    hundredth (50% = 50 = 0.5); plain words whatever their case; all else by math-verify, which compares floating-point
    numbers to 6 digits.

    Args:
        a: one answer; the first of its cluster where `equivalence` is a function.
        b: the other.
        equivalence: "math", "exact" (the same characters), or a function (a, b) -> bool.

    Raises:
        TypeError: an answer is no string, `equivalence` is of another kind, or the function returns no bool.
        ValueError: no such equivalence.
        ImportError: "math" needs math-verify for these two, and it is not installed.
    """
    for name, answer in (("a", a), ("b", b)):
        if answer is not None and not isinstance(answer, str):
            raise TypeError(f"{name}: expected a string or None, got {type(answer).__name__}")
    same = _equality(equivalence)
    return a is not None and b is not None and bool(a.strip()) and bool(b.strip()) and same(a, b)


def _equality(equivalence: Equivalence) -> Callable[[str, str], bool]:
    if isinstance(equivalence, str):
        checks.check_choice("equivalence", equivalence, EQUIVALENCES)
        return _equal_as_math if equivalence == "math" else str.__eq__
    if not callable(equivalence):
        raise TypeError(f"equivalence: expected 'math', 'exact' or a function, got {type(equivalence).__name__}")

    def same(first: str, new: str) -> bool:
        verdict = equivalence(first, new)
        if not isinstance(verdict, bool):  # a function without a return would make every answer different
            raise TypeError(f"equivalence: expected a function that returns a bool, got {type(verdict).__name__}")
        return verdict

    return same


def _equal_as_math(a: str, b: str) -> bool:
    if a == b:
        return True
    one, two = _read(a), _read(b)
    if one.number is not None and two.number is not None:
        if one.percent == two.percent:
            return one.number == two.number
        share, plain = (one.number, two.number) if one.percent else (two.number, one.number)
        return plain in (share, share / 100)
    if not one.text or not two.text:
        return False
    if one.text == two.text or (one.words is not None and one.words == two.words):
        return True
    # math-verify reads a word as a product of letters, to which "listen" and "silent" are equal.
    plain_one = one.words is not None or one.number is not None
    plain_two = two.words is not None or two.number is not None
    if (plain_one and plain_two) or max(len(a), len(b)) > _MAX_LENGTH:
        return False
    return _ask(*sorted((one.formula, two.formula)))


_worker = MathWorker()


@lru_cache(maxsize=1 << 16)
def _ask(first: str, second: str) -> bool:
    return _worker.equal(first, second)


_SCALES = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}

# What makes no difference to an answer's meaning, in the order in which it goes.
_CLEANING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r",\\!\s*", ""),  # 10,\!080
        (r"\{,\}", ","),  # 10{,}080
        (r"(?<!\\)\\[!,;:> ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\\(?:left|right)(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (rf"\\(?:text|textrm|mbox|mathrm)\s*\{{\s*({'|'.join(_SCALES)}|percent)\s*\}}", r" \1"),
        (r"\\?[$€£]|\\(?:dollars?|euro|pounds)(?![A-Za-z])", ""),
        (r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])|°", ""),
        (r"\\%", "%"),
        (r"[−–]", "-"),  # noqa: RUF001 - the minus sign and the dash that stand for it
        (r"×", r"\\times "),  # noqa: RUF001 - the sign, not the letter
        (r"π", r"\\pi "),
        (r"∞", r"\\infty "),
        (r"(?:√|(?<![\\A-Za-z])sqrt)\s*(?:\(([^()]*)\)|(\d+|[a-z]))", r"\\sqrt{\1\2}"),
        (r"(?<=[_^])([A-Za-z0-9])(?![A-Za-z0-9])", r"{\1}"),  # 52_8 and 52_{8}
        (r"\s+", " "),
    ]
]
_MATH_WORDS = {"pi": r"\pi", "infinity": r"\infty"}
_STYLED = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it)|operatorname|boldsymbol)\s*\{([^{}]*)\}")
_NO_DIFFERENCE = re.compile(r"(?<!\d) | (?!\d)")  # every space but the one between two digits
_CHOICE = re.compile(r"\(([A-Za-z])\)")
_TIME = re.compile(r"(\d{1,2}(?::\d\d)?) ?([ap])\.? ?m\.?", re.IGNORECASE)
_WORDS = re.compile(r"[A-Za-z]{3,}(?:[ '-][A-Za-z]+)*|no", re.IGNORECASE)

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d{1,3}(?: \d{3})+|\d+\.?\d*|\.\d+)"
_SIGNED = rf"[+-]? ?{_UNSIGNED}"
_FRACTION = (
    rf"\\frac ?(?:\{{ ?(?P<over>{_SIGNED}) ?\}}|(?P<over_digit>\d)) ?"
    rf"(?:\{{ ?(?P<under>{_SIGNED}) ?\}}|(?P<under_digit>\d))"
)
# A unit does not count: \text{cents}, " inches^2", " km/h". It has three letters or is known: "5 xy" is a product.
# am and pm are no units: they tell two times apart. Nor are words that join numbers or make another number of one.
_NOT_UNITS = (
    r"(?!(?:a\.?m|p\.?m|pi|sqrt|sin|cos|tan|log|mod|and|or|to|plus|minus|times|over|by|if|base|infinity|half|"
    rf"{'|'.join(_SCALES)})\b)"
)
_UNIT_WORD = rf"{_NOT_UNITS}(?:[A-Za-z]{{3,}}|cm|mm|km|kg|mg|ml|ft|in|mi|lb|oz|hr|of|a)"
_UNIT = (
    rf"(?: ?\\(?:text|textrm|mbox|mathrm) ?\{{ ?{_NOT_UNITS}[A-Za-z][A-Za-z ./^0-9]*?[ .]?\}}"
    rf"| {_UNIT_WORD}(?:[ /]{_UNIT_WORD})*(?:/[hs])?) ?(?:\^ ?\{{?[23]\}}?)?"
)
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?) ?(?:(?:(?P<whole>\d+) ?)?{_FRACTION}"
    rf"|(?:(?P<mixed>\d+) )?(?P<top>{_UNSIGNED}) ?/ ?(?P<bottom>{_UNSIGNED})"
    rf"|(?P<digits>\d+)_\{{ ?(?P<base>\d\d?) ?\}}"
    rf"|(?P<decimal>{_UNSIGNED})(?:e(?P<e>[+-]?\d{{1,3}})| ?(?:\\times|\\cdot|\*) ?10 ?\^ ?"
    rf"(?:\{{ ?(?P<power>[+-]?\d{{1,3}}) ?\}}|(?P<bare_power>-?\d{{1,3}})))?)"
    rf"(?: (?P<scale>{'|'.join(_SCALES)})(?![A-Za-z]))?"
    rf"(?: ?(?P<percent>%| percent(?![A-Za-z])))?(?:{_UNIT})?",
    re.IGNORECASE,
)


@lru_cache(maxsize=1 << 16)
def _read(answer: str) -> _Reading:
    """Read an answer as far as exact rules go."""
    formula = _trim(answer)
    if formula.startswith(("\\boxed", "\\fbox")):
        formula = _last_box(formula) or formula
    if len(formula) > _MAX_LENGTH:
        return _Reading(formula, formula, None, False, None)
    for pattern, replacement in _CLEANING:
        formula = pattern.sub(replacement, formula)
    formula = formula.strip()
    if formula.startswith("{") and formula.find("}") == len(formula) - 1:
        formula = formula[1:-1].strip()
    formula = _MATH_WORDS.get(formula.lower(), formula)
    whole = _STYLED.fullmatch(formula)
    number, percent = _number(whole[1].strip() if whole else formula)
    # Names and choices: \text{(C)}, (C) and C; \text{Evelyn} and evelyn.
    plain = " ".join(_STYLED.sub(r"\1", formula).split())
    if match := _CHOICE.fullmatch(plain):
        plain = match[1]
    styled = plain != formula and re.fullmatch(r"[A-Za-z][A-Za-z '-]+", plain)
    words = plain.casefold() if number is None and (styled or _WORDS.fullmatch(plain)) else None
    if match := _TIME.fullmatch(plain):  # math-verify takes am and pm for units
        words = f"{match[1]} {match[2].lower()}m"
    return _Reading(formula, _NO_DIFFERENCE.sub("", plain), number, percent, words)


def _number(formula: str) -> tuple[Fraction | None, bool]:
    """Return a plain number's exact value, or None, and whether it is a percentage."""
    match = _NUMBER.fullmatch(formula)
    if match is None:
        return None, False
    part = match.groupdict()

    def value(*names: str) -> Fraction:
        return Fraction(next((part[name] for name in names if part[name]), "0").replace(",", "").replace(" ", ""))

    if part["base"]:
        base = int(part["base"])
        if not 2 <= base <= 36 or any(int(digit) >= base for digit in part["digits"]):
            return None, False
        number = Fraction(int(part["digits"], base))
    elif part["decimal"]:
        number = value("decimal") * Fraction(10) ** int(value("e", "power", "bare_power"))
    else:
        under = value("under", "under_digit", "bottom")
        if under == 0:
            return None, False
        number = value("whole", "mixed") + value("over", "over_digit", "top") / under
    number *= _SCALES[part["scale"].lower()] if part["scale"] else 1
    return (-number if part["sign"] == "-" else number), part["percent"] is not None


# --- The vote


def majority_vote(
    answers: Sequence[str | None],
    groups: int | Tensor,
    *,
    voters: Tensor | Sequence[bool] | None = None,
    equivalence: Equivalence = "math",
    min_share: float = 0.0,
) -> Vote:
    """Let each group's voters elect the label that the whole group is then scored by.

    Equal answers form a cluster: an answer joins the first cluster whose first answer it equals. Voters are clustered
    before the others, so that who may not vote has no say in the label. The largest cluster of voters wins; of two as
    large, the one whose first voter came first.

    Args:
        answers: B answers; None or an empty one did not parse, and neither votes nor agrees.
        groups: group size G, or ascending int offsets (P+1,); groups may be empty.
        voters: (B,) bool, as a tensor or a sequence: who may vote. Everybody is scored. None: all.
        equivalence: "math" and "exact" as in :func:`answers_equal`, or a function (first of the cluster, new answer) ->
            bool. It is not called for an answer that its group has had before in the same characters.
        min_share: in [0, 1]. A winner with a smaller share of the voters' parsed answers gives no label.

    Raises:
        TypeError: an argument of the wrong kind, or a function that returns no bool.
        ValueError: `groups`, `voters`, `equivalence` or `min_share` out of range or of the wrong shape.
        ImportError: "math" needs math-verify for these answers, and it is not installed.
    """
    if isinstance(answers, str) or not isinstance(answers, Sequence):
        raise TypeError(f"answers: expected a sequence of strings and None, got {type(answers).__name__}")
    for i, answer in enumerate(answers):
        if answer is not None and not isinstance(answer, str):
            raise TypeError(f"answers: expected strings and None, got {type(answer).__name__} at {i}")
    B = len(answers)
    offsets = sequences.group_offsets(groups.cpu() if isinstance(groups, Tensor) else groups, B, torch.device("cpu"))
    sequences.check_offset_values("groups", offsets, B)
    may_vote = _voters(voters, B)
    same = _equality(equivalence)
    checks.check_number("min_share", min_share, at_least=0.0, at_most=1.0)

    labels: list[str | None] = []
    share: list[float] = []
    cluster: list[int] = []
    cluster_share: list[float] = []
    agrees: list[bool] = []
    for start, end in itertools.pairwise(offsets.tolist()):
        firsts, of_rollout = _clusters(answers[start:end], may_vote[start:end], same)
        votes = [0] * len(firsts)
        for c, votes_too in zip(of_rollout, may_vote[start:end], strict=True):
            if votes_too and c >= 0:
                votes[c] += 1
        total = sum(votes)
        shares = [count / total if total else 0.0 for count in votes]
        winner = votes.index(max(votes)) if total else -1  # clusters stand in the order of their first voter
        wins = total > 0 and shares[winner] >= min_share
        labels.append(firsts[winner] if wins else None)
        share.append(shares[winner] if total else 0.0)
        cluster_share += [shares[c] if c >= 0 else 0.0 for c in of_rollout]
        agrees += [wins and c == winner for c in of_rollout]
        number = {c: n for n, c in enumerate(dict.fromkeys(c for c in of_rollout if c >= 0))}
        cluster += [number.get(c, -1) for c in of_rollout]
    return Vote(
        labels=labels,
        share=torch.tensor(share, dtype=torch.float32),
        cluster=torch.tensor(cluster, dtype=torch.int64),
        cluster_share=torch.tensor(cluster_share, dtype=torch.float32),
        agrees=torch.tensor(agrees, dtype=torch.float32),
    )


def _voters(voters: Tensor | Sequence[bool] | None, B: int) -> list[bool]:
    if voters is None:
        return [True] * B
    if isinstance(voters, Tensor):
        return checks.check_tensor("voters", voters, dtypes=(torch.bool,), shape=(B,)).tolist()
    if isinstance(voters, str) or not isinstance(voters, Sequence):
        raise TypeError(f"voters: expected a bool tensor or a sequence of bools, got {type(voters).__name__}")
    if len(voters) != B:
        raise ValueError(f"voters: expected one bool for each of the {B} answers, got {len(voters)}")
    return [checks.check_flag(f"voters[{i}]", voter) for i, voter in enumerate(voters)]


def _clusters(
    answers: Sequence[str | None], may_vote: Sequence[bool], same: Callable[[str, str], bool]
) -> tuple[list[str], list[int]]:
    """Return the first answer of each cluster, and each rollout's cluster: voters' clusters first, -1 for no answer."""
    firsts: list[str] = []
    of_rollout = [-1] * len(answers)
    known: dict[str, int] = {}
    for i in sorted(range(len(answers)), key=lambda i: not may_vote[i]):
        answer = answers[i]
        if answer is None or not answer.strip():
            continue
        if answer not in known:
            known[answer] = next((c for c, first in enumerate(firsts) if same(first, answer)), len(firsts))
            if known[answer] == len(firsts):
                firsts.append(answer)
        of_rollout[i] = known[answer]
    return firsts, of_rollout
