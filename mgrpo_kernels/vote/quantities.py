"""Values with currencies and units: ``$1.5M``, ``60 m/s``, ``12 sq ft``, ``2 h 30 min``, ``12th``."""

from __future__ import annotations

import itertools
import re
from fractions import Fraction
from typing import NamedTuple

from mgrpo_kernels.vote.formulas import Node, Parser
from mgrpo_kernels.vote.normal import ROMAN
from mgrpo_kernels.vote.tokens import FUNCTIONS, Token, UnreadError, tokens_of
from mgrpo_kernels.vote.units import CURRENCY_SIGNS, SQUARES, find_unit

UnitKey = tuple[tuple[str, Fraction, int], ...]
"""A unit as a product: (dimension, size, power) of each factor."""


class Quantity(NamedTuple):
    """A formula, and the unit after or the currency before it."""

    node: Node
    unit: UnitKey | None


_CURRENCY = re.compile(
    rf"([+-]?)\s*(?:(?:U\.?S\.?|AU?|CA?|NZ|HK|S)?\s*[{CURRENCY_SIGNS}]|(?:USD|EUR|GBP|JPY|CNY|INR|CAD|AUD|CHF|RMB|Rs\.?|Rp)(?![A-Za-z]))"
    r"\s*(?=[+-]?\s*[\d.\\(])"
)
_SCALED_LETTER = re.compile(r"(?P<number>[+-]?\d+(?:\.\d+)?)\s?(?P<letter>k|K|M|B|bn|Bn|mn|T)")
_LETTERS = {"k": 10**3, "K": 10**3, "M": 10**6, "mn": 10**6, "B": 10**9, "bn": 10**9, "Bn": 10**9, "T": 10**12}
_ORDINAL = re.compile(r"(\d+)\s*(?:\^\s*\{?\s*)?(?:st|nd|rd|th)\s*\}?")
MONEY: UnitKey = (("money", Fraction(1), 1),)
_FILLERS = ("old",)  # 12 years old


def read_quantity(text: str) -> Quantity:
    """Read a formula in normal form with its unit, to the last character.

    Raises:
        UnreadError: it is none.
    """
    money = None
    if match := _CURRENCY.match(text):
        text, money = match[1] + text[match.end() :], MONEY
    if (match := _SCALED_LETTER.fullmatch(text)) and is_scale(match["letter"], " " in text, money is not None):
        return Quantity(("number", Fraction(match["number"]) * _LETTERS[match["letter"]]), money)
    if match := _ORDINAL.fullmatch(text):
        return Quantity(("number", Fraction(match[1])), None)
    tokens = tokens_of(text)
    for index in range(1, len(tokens)):
        unit = read_unit(tokens[index:]) if may_start_unit(tokens, index) else None
        if unit is not None:
            try:
                return Quantity(Parser(tokens[:index]).formula(), unit)
            except UnreadError:
                continue
    return Quantity(Parser(tokens).formula(), money)


def is_scale(letter: str, spaced: bool, money: bool) -> bool:
    """Return whether a letter after a number stands for thousands or millions: 5k, $1.5M; 5 K are kelvins."""
    return money or letter in ("bn", "Bn", "mn") or (letter in ("k", "M", "K") and not spaced)


def may_start_unit(tokens: list[Token], index: int) -> bool:
    """Return whether a unit may start at a token: a single plain letter does so only after a space and a number (5 m; 5m is 5 times m)."""
    token, before = tokens[index], tokens[index - 1]
    if token.text == "°" and any(each.text.removeprefix("\\") in FUNCTIONS for each in tokens[:index]):
        return False  # sin 30°: of the argument
    if token.text in ("°", *CURRENCY_SIGNS) or token.kind == "roman":
        return True
    if token.kind == "word":
        return True
    compound = index + 1 < len(tokens) and tokens[index + 1].text == "/" and before.kind == "number"
    plain = all(each.kind != "symbol" or each.text == "π" for each in tokens[:index])
    return token.kind == "symbol" and plain and before.text != "/" and (token.spaced or compound)


def read_unit(tokens: list[Token]) -> UnitKey | None:
    """Return the unit that the tokens name, all of them, or None."""
    factors: list[tuple[str, Fraction, int]] = []
    sign, power, at = 1, 1, 0
    while at < len(tokens):
        text = tokens[at].text.removeprefix(ROMAN)
        lower = text.lower()
        if text == "/" or lower == "per":
            sign, at = -1, at + 1
            if at == len(tokens):
                return None
        elif (text == "*" and factors) or text == "." or (lower in _FILLERS and factors):
            at += 1
        elif lower in SQUARES and not factors_need(factors, tokens, at):
            power, at = 3 if lower.startswith("cu") else 2, at + 1
        else:
            unit, length = _unit_at(tokens, at)
            if unit is None:
                return None
            at += length
            found, at = _power_at(tokens, at)
            factors.append((*unit, sign * power * found))
            power = 1
    return tuple(factors) if factors and power == 1 else None


def factors_need(factors: list[tuple[str, Fraction, int]], tokens: list[Token], at: int) -> bool:
    """Return whether "squared" and "cubed" stand here without a unit before them."""
    return tokens[at].text.lower() in ("squared", "cubed") and not factors


def _unit_at(tokens: list[Token], at: int) -> tuple[tuple[str, Fraction] | None, int]:
    text = tokens[at].text.removeprefix(ROMAN)
    if text == "°":
        follows = tokens[at + 1].text.removeprefix(ROMAN) if at + 1 < len(tokens) else ""
        if follows in ("C", "F", "K", "celsius", "Celsius", "fahrenheit", "Fahrenheit"):
            return ("temperature", Fraction(ord(follows[0].upper()))), 2
        return ("angle", Fraction(1)), 1
    if text in CURRENCY_SIGNS:
        return ("money", Fraction(1)), 1
    unit = find_unit(text)
    return (None, 0) if unit is None else ((unit.dimension, unit.factor), 1)


def _power_at(tokens: list[Token], at: int) -> tuple[int, int]:
    """Return the power that stands at a token, 1 where there is none, and where it ends."""
    texts = [token.text for token in tokens[at : at + 5]]
    if texts[:1] and texts[0].lower() in ("squared", "cubed"):
        return (2 if texts[0].lower() == "squared" else 3), at + 1
    if texts[:1] != ["^"]:
        return 1, at
    rest = texts[1:]
    braces = rest[:1] == ["{"]
    rest = rest[braces:]
    negative = rest[:1] == ["-"]
    rest = rest[negative:]
    if not rest or not rest[0].isdigit() or len(rest[0]) > 1 or (braces and rest[1:2] != ["}"]):
        return 1, at
    return (-1 if negative else 1) * int(rest[0]), at + 2 + 2 * braces + negative


def compound(text: str) -> tuple[str, Fraction] | None:
    """Return (dimension, total) of a sum of quantities, from the largest unit down: ``5 ft 3 in``, ``2 hours and 30 minutes``."""
    tokens = tokens_of(re.sub(r"\band\b|,", " ", text))
    numbers = [at for at, token in enumerate(tokens) if token.kind == "number" and token.value is not None]
    starts = [at for at in numbers if at == 0 or tokens[at - 1].kind in ("word", "symbol", "roman")]
    if len(starts) < 2 or starts[0] != 0 or starts != numbers:
        return None
    total, dimensions, sizes = Fraction(0), set(), []
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        unit = read_unit(tokens[start + 1 : end])
        value = tokens[start].value
        if unit is None or len(unit) != 1 or unit[0][2] != 1 or value is None:
            return None
        dimension, size, _ = unit[0]
        total += value * size
        dimensions.add(dimension)
        sizes.append(size)
    descends = all(large > small for large, small in itertools.pairwise(sizes))
    return (dimensions.pop(), total) if len(dimensions) == 1 and descends else None
