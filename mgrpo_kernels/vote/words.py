"""Numbers in words: "twelve", "forty-two", "two hundred and five", "two thirds", "minus three"."""

from __future__ import annotations

import re
from fractions import Fraction

from mgrpo_kernels.vote.tokens import scale_of

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = ("twenty thirty forty fifty sixty seventy eighty ninety").split()
_ONES = {word: number for number, word in enumerate(_SMALL)} | {word: 20 + 10 * i for i, word in enumerate(_TENS)}
_HUNDRED = 100
_THOUSANDS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def number_in_words(text: str) -> Fraction | None:
    """Return the number that a text spells out, or None."""
    words = re.findall(r"[a-z]+", text.lower())
    if not words or not re.fullmatch(r"[A-Za-z]+(?:[ -][A-Za-z]+)*", text.strip()):
        return None
    if words[0] in ("minus", "negative"):
        value = number_in_words(" ".join(words[1:]))
        return None if value is None else -value
    if words[-1:] == ["half"] and words[-3:-1] == ["and", "a"] and (whole := _whole(words[:-3])) is not None:
        return whole + Fraction(1, 2)
    if words[0] in ("a", "an") and len(words) == 2:
        return scale_of(words[1]) or _fraction(words[1])
    whole = _whole(words)
    if whole is not None:
        return Fraction(whole)
    if words == ["half"]:
        return Fraction(1, 2)
    over = _whole(words[:-1])
    part = scale_of(words[-1]) if over != 1 else _fraction(words[-1])
    return None if over is None or part is None else over * part


def _fraction(word: str) -> Fraction | None:
    """Return what a singular fraction is worth: "third" in "one third"."""
    return scale_of(word) or scale_of(f"{word}s")


def _whole(words: list[str]) -> int | None:
    """Return a whole number in words."""
    total = current = 0
    last = ""
    if not words or words[0] == "and":
        return None
    for word in words:
        if word in _ONES:
            fits = last in ("", "hundred", "and", *_THOUSANDS) or (last in _TENS and 0 < _ONES[word] < 10)
            if not fits:
                return None
            current += _ONES[word]
        elif word == "hundred" and 0 < current < 10:
            current *= _HUNDRED
        elif word in _THOUSANDS and current:
            total, current = total + current * _THOUSANDS[word], 0
        elif not (word == "and" and last in ("hundred", *_THOUSANDS)):
            return None
        last = word
    return None if last == "and" else total + current
