"""Sets of real numbers as unions of intervals: ``x < 3`` and ``(-∞, 3)``, ``x ≠ 0`` and ``(-∞,0)∪(0,∞)``."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from mgrpo_kernels.vote.values import Key


class End(NamedTuple):
    """An end of an interval: its place among the numbers, its key, and whether it belongs to the interval."""

    place: Any  # Fraction, or an infinite float
    key: Key
    closed: bool


class Interval(NamedTuple):
    """The numbers between two ends."""

    low: End
    high: End


INFINITY = End(float("inf"), ("infinity", 1), False)
MINUS_INFINITY = End(float("-inf"), ("infinity", -1), False)
REALS = (Interval(MINUS_INFINITY, INFINITY),)


def place_of(key: Key) -> Any | None:
    """Return where a key stands among the real numbers, or None for what is no real number."""
    if key[0] == "number":
        return key[1]
    if key[0] == "infinity":
        return float("inf") * key[1]
    if key[0] == "real" and len(key[1]) == 1:
        sign, mantissa, exponent = key[1][0]
        if abs(exponent) < 4096:
            return (-1) ** sign * Fraction(int(mantissa)) * Fraction(2) ** exponent
    return None


def end(key: Key, closed: bool) -> End | None:
    """Return an end of an interval, or None where the key is no real number."""
    place = place_of(key)
    return None if place is None else End(place, key, closed and key[0] != "infinity")


def union(intervals: Sequence[Interval]) -> list[Interval]:
    """Return the same set as separate intervals in ascending order."""
    merged: list[Interval] = []
    for each in sorted(intervals, key=lambda interval: (interval.low.place, not interval.low.closed)):
        if each.low.place > each.high.place or (
            each.low.place == each.high.place and not (each.low.closed and each.high.closed)
        ):
            continue  # empty
        if merged:
            last = merged[-1]
            touches = each.low.place == last.high.place and (each.low.closed or last.high.closed)
            if each.low.place < last.high.place or touches:
                high = max(last.high, each.high, key=lambda end: (end.place, end.closed))
                merged[-1] = Interval(last.low, high)
                continue
        merged.append(each)
    return merged


def intersection(one: Sequence[Interval], two: Sequence[Interval]) -> list[Interval]:
    """Return the numbers that are in both."""
    return union(
        [
            Interval(
                max(a.low, b.low, key=lambda end: (end.place, not end.closed)),
                min(a.high, b.high, key=lambda end: (end.place, end.closed)),
            )
            for a in one
            for b in two
        ]
    )


def complement(intervals: Sequence[Interval]) -> list[Interval]:
    """Return the real numbers that are in none of the intervals."""
    rest: list[Interval] = list(REALS)
    for each in intervals:
        below = Interval(MINUS_INFINITY, each.low._replace(closed=not each.low.closed))
        above = Interval(each.high._replace(closed=not each.high.closed), INFINITY)
        outside = [part for part, side in ((below, each.low), (above, each.high)) if abs(side.place) != float("inf")]
        rest = intersection(rest, outside)
    return rest


def points(keys: Sequence[Key]) -> list[Interval] | None:
    """Return single numbers as intervals, or None where one is no real number."""
    ends = [end(key, True) for key in keys]
    return [Interval(each, each) for each in ends if each is not None] if None not in ends else None


def set_key(intervals: Sequence[Interval]) -> Key:
    """Return the key of a set. Of an open interval it is also that of the pair, since ``(1, 2)`` may be either."""
    parts = union(intervals)
    if not parts:
        return ("empty",)
    keys = [
        ("interval", "[" if low.closed else "(", low.key, high.key, "]" if high.closed else ")") for low, high in parts
    ]
    return keys[0] if len(keys) == 1 else ("union", *keys)
