r"""Equations, inequalities and memberships: ``x = 3``, ``2x - y + 3 = 0``, ``1 < x \le 2``, ``x \in \{1, 2\}``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mpmath

from mgrpo_kernels.vote.formulas import Node, parse_formula, symbols_of
from mgrpo_kernels.vote.quantities import read_quantity
from mgrpo_kernels.vote.sets import INFINITY, MINUS_INFINITY, Interval, complement, end, points, set_key
from mgrpo_kernels.vote.structure import inside, split_top
from mgrpo_kernels.vote.tokens import UnreadError
from mgrpo_kernels.vote.values import (
    POINTS,
    Key,
    UncertainError,
    constant_key,
    digits_of,
    key_of_values,
    value_keys,
    values_at_points,
)

if TYPE_CHECKING:
    from mgrpo_kernels.vote.keys import Part

_SIGNS = re.compile(r"\s*[=<>≤≥≠≈∈∉→≡]\s*")
_NAME = re.compile(
    r"[^\W\d_](?:_(?:\w|\{[^{}]*\}))?'*"  # x, x_1, f'
    r"|[A-Za-zα-ω]{1,3}(?:_\w|_\{[^{}]*\})?(?:\^\{?-1\}?)?'*\s?[(\[][^()=]*[)\]]"  # f(x), P(A), f^{-1}(x)
    r"|\\frac\{d ?[a-z]?\}\{d ?[a-z]\}|d[a-z]?/d[a-z]"  # dy/dx
    r"|m?\s?[∠△]\s?[A-Za-z]+|\|?\s?(?:\\overline\{)?[A-Z]{2,4}\}?\s?\|?|\|[A-Za-z]\|"  # ∠A, AB, |AB|
    r"|[A-Za-z]{2,}(?:[ '-]+[A-Za-z]+)*"  # Area, Total cost
)
_NOT_NAMES = re.compile(r"\b(?:sin|cos|tan|log|ln|exp|sqrt|mod|and|or|if|lim|max|min)\b")
_TURNED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}


def read_relation(text: str, read: Callable[[str], Part | None]) -> Part | None:
    """Read an equation, inequality or membership; None where the text has no such sign.

    Args:
        text: in normal form.
        read: what reads a side.

    Raises:
        UnreadError, UncertainError: it is one, but not understood: a text.
    """
    sides = split_top(text, _SIGNS)
    if len(sides) < 2:
        return None
    signs = [sign for sign, level in zip(text, _levels(text), strict=True) if level == 0 and sign in "=<>≤≥≠≈∈∉→≡"]
    sides = [each.strip() for each in sides]
    if len(signs) != len(sides) - 1 or "→" in signs or "≡" in signs or "∉" in signs or not all(sides):
        return _other(sides, signs)
    if set(signs) <= {"=", "≈"}:
        return _equation(sides, read)
    if signs == ["∈"]:
        part = read(sides[1]) if is_name(sides[0]) else None
        return _other(sides, signs) if part is None or (part.keys and part.keys[0][0] == "text") else part
    if signs == ["≠"]:
        return _unequal(sides, signs)
    return _inequality(sides, signs)


def _levels(text: str) -> list[int]:
    from mgrpo_kernels.vote.structure import depths

    return depths(text)


def is_name(text: str) -> bool:
    """Return whether a text names a thing, as the left side of a definition does."""
    if found := inside(text):  # (x, y)
        return found[0] == "(" and all(_NAME.fullmatch(each.strip()) for each in found[1].split(","))
    return _NAME.fullmatch(text.replace("\x01", "").strip()) is not None and not _NOT_NAMES.search(text)


def _other(sides: list[str], signs: list[str]) -> Part:
    from mgrpo_kernels.vote.keys import Part, text_key

    pieces = [text_key(side)[1] for side in sides]
    return Part((("relation", *pieces, *signs),))


def _equation(sides: list[str], read: Callable[[str], Part | None]) -> Part | None:
    if len(sides) > 2:
        return _chain(sides, read)
    left, right = sides
    if not is_name(left) and is_name(right):
        left, right = right, left
    if is_name(left) and not _is_line(left, right):
        part = read(right)
        if part is None or _mentions(left, right):
            return _other(sides, ["="])
        return part._replace(name=_name_of(left), in_braces=False)
    one, two = read_quantity(left).node, read_quantity(right).node
    names = symbols_of(one) | symbols_of(two)
    if not names:
        keys = value_keys(two)
        return _part(keys) if value_keys(one) == keys else _other(sides, ["="])
    return _implicit(("+", one, ("neg", two)), names)


def _name_of(left: str) -> str:
    return re.sub(r"\s+", " ", left).strip()


def _mentions(name: str, text: str) -> bool:
    """Return whether a variable stands on both sides, so that the equation defines nothing."""
    if len(name) > 1:
        return False
    try:
        return name in symbols_of(read_quantity(text).node)
    except UnreadError:
        return False


def _is_line(left: str, right: str) -> bool:
    """Return whether an equation relates x and y, so that it is solved for y whichever side stands alone."""
    if left not in ("x", "y"):
        return False
    try:
        return {"x", "y"} <= symbols_of(read_quantity(right).node) | {left}
    except UnreadError:
        return False


def _chain(sides: list[str], read: Callable[[str], Part | None]) -> Part | None:
    """Read ``x = 2 + 3 = 5``: the value, where all sides but the first name have the same."""
    name = _name_of(sides[0]) if is_name(sides[0]) else None
    parts = [read(side) for side in (sides[1:] if name else sides)]
    keys = [part.keys for part in parts if part is not None]
    if len(keys) == len(parts) and len(set(keys)) == 1 and parts[-1] is not None:
        return parts[-1]._replace(name=name)
    return _other(sides, ["="] * (len(sides) - 1))


def _part(keys: list[Key]) -> Part:
    from mgrpo_kernels.vote.keys import Part

    return Part(tuple(keys))


def _implicit(node: Node, names: set[str]) -> Part:
    """Return node = 0: solved for y, or the only variable, where that is linear; else as the equation, up to a factor."""
    variable = "y" if "y" in names else next(iter(names)) if len(names) == 1 else None
    if variable is not None and (solved := _solution(node, variable, names)) is not None:
        return _part([solved])
    values = values_at_points(node)
    return _part([("equation", *_up_to_a_factor(values))])


def _solution(node: Node, variable: str, names: set[str]) -> Key | None:
    """Return the key of what a variable equals where node = 0 is linear in it, else None."""
    solved = []
    constant = names == {variable}
    at = [_values_with(node, variable, number) for number in (0, 1, 2)]
    for zero, one, two in zip(*at, strict=True):
        with mpmath.workdps(60):
            slope = one - zero
            if slope == 0 or abs((two - one) - slope) > abs(slope) * mpmath.mpf(10) ** -30:
                return None
            solved.append(-zero / slope)
    return constant_key(solved[0]) if constant else key_of_values(solved)


def _values_with(node: Node, variable: str, number: int) -> list[Any]:
    """Return the values at the points, with a number for one variable."""
    from fractions import Fraction

    def put(each: Node) -> Node:
        if each == ("symbol", variable):
            return ("number", Fraction(number))
        return tuple(put(part) if isinstance(part, tuple) else part for part in each)

    values = values_at_points(put(node))
    return values if len(values) == POINTS else values * POINTS


def _up_to_a_factor(values: list[Any]) -> list[Any]:
    """Return the values in units of the first, so that an equation may be multiplied by a number."""
    with mpmath.workdps(60):
        scale = values[0]
        if scale == 0 or len(values) == 1:
            raise UncertainError("no scale")
        return [digits_of(value / scale) for value in values[1:]]


def _unequal(sides: list[str], signs: list[str]) -> Part:
    from mgrpo_kernels.vote.keys import Part

    left, right = (sides[1], sides[0]) if is_name(sides[1]) else (sides[0], sides[1])
    if len(left) == 1 and left.isalpha():
        found = points(value_keys(parse_formula(right)))
        if found is not None:
            intervals = tuple(complement(found))
            return Part((set_key(intervals),), intervals=intervals)
    return _other(sides, signs)


def _inequality(sides: list[str], signs: list[str]) -> Part:
    """Return the interval of ``x < 3`` or ``1 < x ≤ 2``, or the inequality of two formulas, up to a positive factor."""
    from mgrpo_kernels.vote.keys import Part

    if not set(signs) <= set(_TURNED):
        return _other(sides, signs)
    nodes = [("symbol", "∞") if _infinite(each) else read_quantity(each).node for each in sides]
    if len(sides) == 2:
        for (a, b), sign in (((0, 1), signs[0]), ((1, 0), _TURNED[signs[0]])):
            if _lone(nodes[a]) and not symbols_of(nodes[b]):
                return _ray(sides[b], value_keys(nodes[b])[0], sign)
        large, small = nodes if signs[0] in ">≥" else nodes[::-1]
        difference, closed = ("+", large, ("neg", small)), signs[0] in "≤≥"
        return _solved(difference, closed) or _half_plane(difference, closed)
    if len(sides) == 3 and _lone(nodes[1]) and len({sign in "<≤" for sign in signs}) == 1:
        low, high = (0, 2) if signs[0] in "<≤" else (2, 0)
        ends = [_end(sides[at], signs[at // 2] in "≤≥") for at in (low, high)]
        if ends[0] is not None and ends[1] is not None:
            interval = Interval(ends[0], ends[1])
            return Part((set_key([interval]),), intervals=(interval,))
    return _other(sides, signs)


def _infinite(text: str) -> bool:
    return text.strip("+- ") == "∞"


def _lone(node: Node) -> bool:
    return node[0] == "symbol" and bool(symbols_of(node)) and node[1] != "∞"


def _end(text: str, closed: bool) -> Any:
    if _infinite(text):
        return MINUS_INFINITY if text.startswith("-") else INFINITY
    return end(value_keys(read_quantity(text).node)[0], closed)


def _ray(text: str, key: Key, sign: str) -> Part:
    from mgrpo_kernels.vote.keys import Part

    place = end(key, sign in "≤≥")
    if place is None:
        raise UnreadError(text)
    interval = Interval(place, INFINITY) if sign in ">≥" else Interval(MINUS_INFINITY, place)
    return Part((set_key([interval]),), intervals=(interval,))


def _solved(node: Node, closed: bool) -> Part | None:
    """Return the ray of node > 0 where node is linear in its only variable."""
    names = symbols_of(node)
    if len(names) != 1:
        return None
    variable = next(iter(names))
    solution = _solution(node, variable, names)
    if solution is None:
        return None
    zero, one = (_values_with(node, variable, number)[0] for number in (0, 1))
    if mpmath.im(zero) != 0 or mpmath.im(one) != 0:
        raise UnreadError(variable)  # complex numbers have no order
    return _ray(variable, solution, (">" if one > zero else "<") if not closed else ("≥" if one > zero else "≤"))


def _half_plane(node: Node, closed: bool) -> Part:
    """Return node > 0 in units of its size at the first point."""
    values = values_at_points(node)
    with mpmath.workdps(60):
        scale = abs(values[0])
        if scale == 0 or len(values) == 1:
            raise UncertainError("no scale")
        found = tuple(digits_of(value / scale) for value in values)
    return _part([("inequality", closed, *found)])
