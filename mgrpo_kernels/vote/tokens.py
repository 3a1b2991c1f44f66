"""Tokens of a formula, and the words that have a meaning in one."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from mgrpo_kernels.vote.normal import ROMAN


class UnreadError(ValueError):
    """The text is no formula that this parser knows."""


class Token(NamedTuple):
    """A token, and whether a space stands before it."""

    kind: str  # number, word, symbol, command, sign
    text: str
    spaced: bool
    value: Fraction | None = None


_TOKEN = re.compile(
    r"(?P<space>\s*)(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:\\overline\s*\{\d+\}|\\dot\s*\{?\d\}?)?)(?P<e>[eE][+-]?\d{1,3}(?![\w.]))?"
    r"|(?P<command>\\[A-Za-z]+)"
    rf"|(?P<roman>{ROMAN}[^\W\d_])"
    r"|(?P<word>[A-Za-z]+(?:'s)?)"
    r"|(?P<sign>\S))",
)

FUNCTIONS = frozenset(
    ("sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh exp ln log lg sqrt abs").split()
)
SCALES = {
    "hundred": Fraction(100), "thousand": Fraction(10**3), "million": Fraction(10**6), "billion": Fraction(10**9),
    "trillion": Fraction(10**12), "dozen": Fraction(12), "score": Fraction(20), "gross": Fraction(144), "bn": Fraction(10**9),
    "mn": Fraction(10**6), "lakh": Fraction(10**5), "crore": Fraction(10**7), "percent": Fraction(1, 100), "pct": Fraction(1, 100),
    "half": Fraction(1, 2), "halves": Fraction(1, 2), "third": Fraction(1, 3), "quarter": Fraction(1, 4), "fourth": Fraction(1, 4),
    "fifth": Fraction(1, 5), "sixth": Fraction(1, 6), "seventh": Fraction(1, 7), "eighth": Fraction(1, 8), "ninth": Fraction(1, 9),
    "tenth": Fraction(1, 10), "hundredth": Fraction(1, 100), "thousandth": Fraction(1, 1000), "millionth": Fraction(1, 10**6),
    "billionth": Fraction(1, 10**9), "ten": Fraction(10), "pair": Fraction(2), "one": Fraction(1), "permille": Fraction(1, 1000),
}  # fmt: skip
"""Words after a number that multiply it."""
_FIRST_SCALES = frozenset(("lakh crore bn mn percent pct permille halves").split())  # these have no plural in s
_PLURAL_ONLY = frozenset(
    ("third fourth fifth sixth seventh eighth ninth tenth hundredth thousandth millionth billionth ten one").split()
)
POSTFIX_WORDS = {"squared": 2, "cubed": 3}
_NOT_PRODUCTS = frozenset(
    (
        "to or is if by no of at in on as an am pm and the for per mod not bc ad ce bce max min gcd lcm det "
        "dim deg arg st nd rd th"
    ).split()
)


def scale_of(word: str) -> Fraction | None:
    """Return what a word after a number multiplies it by (``million``, ``dozens``, ``tenths``), or None."""
    word = word.lower()
    singular = word.removesuffix("s")
    if word in SCALES and word not in _PLURAL_ONLY:
        return SCALES[word]
    return SCALES[singular] if singular != word and singular in SCALES and singular not in _FIRST_SCALES else None


def tokens_of(text: str) -> list[Token]:
    """Split a text in normal form into tokens."""
    tokens = []
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup if match.lastgroup != "e" else "number"
        spaced = bool(match["space"])
        if kind == "number":
            tokens.append(Token("number", match[0].strip(), spaced, _number(match["number"], match["e"])))
        elif kind == "word" and len(match["word"]) == 1:
            tokens.append(Token("symbol", match["word"], spaced))
        elif kind == "sign" and match["sign"].isalpha():
            tokens.append(Token("symbol", match["sign"], spaced))
        elif kind is not None and kind != "space":
            tokens.append(Token(kind, match[kind], spaced))
    return tokens


def _number(digits: str, exponent: str | None) -> Fraction:
    repeated = re.search(r"\\(?:overline|dot)\s*\{?(\d+)\}?$", digits)
    if repeated:
        digits = digits[: repeated.start()]
        if "." not in digits:
            raise UnreadError(digits)
        decimals = len(digits) - digits.index(".") - 1
        period = Fraction(int(repeated[1]), 10 ** len(repeated[1]) - 1) / 10**decimals
    value = Fraction(digits.rstrip(".") or "0") + (period if repeated else 0)
    return value * Fraction(10) ** int(exponent[1:]) if exponent else value


def is_product_of_letters(word: str) -> bool:
    """Return whether a run of letters inside a formula may be a product: ``xy``, ``abc``, but not ``or`` or ``apples``."""
    return 2 <= len(word) <= 3 and word.isalpha() and word.lower() not in _NOT_PRODUCTS and scale_of(word) is None
