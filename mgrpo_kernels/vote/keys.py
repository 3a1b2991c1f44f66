"""The canonical key of an answer: equal answers have equal keys, so equality is an equivalence by construction.

A key says what an answer is: an exact number, another real or complex number, a formula, an interval or union, a pair or tuple, a
collection, named values, an equation or inequality, a matrix, a ratio, a time of day, a choice, or else a text.
"""

from __future__ import annotations

import itertools
import re
from functools import lru_cache
from typing import NamedTuple

from mgrpo_kernels.vote import relations
from mgrpo_kernels.vote.normal import SET_CLOSE, SET_OPEN, normal_form, trimmed
from mgrpo_kernels.vote.quantities import UnitKey, compound, read_quantity, read_unit
from mgrpo_kernels.vote.sets import REALS, Interval, complement, end, intersection, points, set_key, union
from mgrpo_kernels.vote.structure import inside, is_balanced, join_thousands, split_list, split_top
from mgrpo_kernels.vote.symbolic import NoVerdictError, closed_form, is_symbolic
from mgrpo_kernels.vote.tokens import UnreadError, tokens_of
from mgrpo_kernels.vote.values import Key, UncertainError, number_key, value_keys
from mgrpo_kernels.vote.words import number_in_words

MAX_LENGTH = 256
"""Characters. A longer answer is a rambling: only the same text equals it."""


class Part(NamedTuple):
    """An answer or a part of one, as it was read."""

    keys: tuple[Key, ...]  # one, or two of a ±
    name: str | None = None  # x of "x = 3"
    unit: UnitKey | None = None
    intervals: tuple[Interval, ...] | None = None  # of a set of real numbers
    in_braces: bool = False


class NotReadError(ValueError):
    """The text is nothing that has a structure: compare it as a text."""


_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s+)?[(\[]?([A-Za-z])[)\].:]?|(?:option|choice)\s+[(\[]?([A-Za-z])[)\]]?",
    re.IGNORECASE,
)
_CHOICE_WITH_TEXT = re.compile(r"\(([A-H])\)\s*\S.*|([A-H])\)\s*\S.*", re.DOTALL)
_CLOCK = re.compile(r"(\d{1,2})(?::([0-5]\d))?(?::([0-5]\d))?\s*([ap])\.?\s?m\.?", re.IGNORECASE)
_PLAIN_CLOCK = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)")
_NOON = re.compile(r"(?:12(?::00)?\s*)?(noon|midnight)", re.IGNORECASE)
_RATIO = re.compile(r"\s*:\s*")
_SET_OPERATION = re.compile(r"\s*[∪∩∖]\s*")
_APPROXIMATELY = re.compile(r"^(?:approximately|approx\.?|about|around|roughly|exactly|≈|=)\s*(?=\S)", re.IGNORECASE)
_REMARK = re.compile(r"(.*\S)\s*\(([^()]*[A-Za-z%]{2}[^()]*|[^()]*%)\)")
_NO_REMARK = re.compile(r"(?:approx(?:imately|\.)?|rounded\b.*|to the nearest\b.*|exact(?:ly)?|about)", re.IGNORECASE)
_RESTATED = re.compile(r"^(?:or|i\.?e\.?,?|that is,?|=|≈|approx(?:imately|\.)?|about|in words:?)\s*", re.IGNORECASE)
_ALIASES: dict[str, Key] = {
    **dict.fromkeys(("∅", "⦃⦄", "emptyset", "theemptyset", "nosolution", "nosolutions"), ("empty",)),
    **dict.fromkeys(("ℝ", "allrealnumbers", "allreals", "thesetofallrealnumbers"), set_key(REALS)),
    **dict.fromkeys(("∞", "+∞", "infinity", "positiveinfinity"), ("infinity", 1)),
    "n/a": ("text", "n/a"),
    **dict.fromkeys(("-∞", "-infinity", "negativeinfinity"), ("infinity", -1)),
}
_NO_DIFFERENCE = re.compile(r"(?<![\d.]) | (?![\d.])")  # every space but the one between two digits
_DASHED_DIGITS = re.compile(r"\d+(?:-\d+){2,}")  # 3-4-5 is a triangle, and 2020-01-15 a date
_ONLY_LETTERS = re.compile(
    r"(?!pi$|(?:sin|cos|tan|log|ln|exp|sqrt)\s)[A-Za-z\s']{2,}"
)  # a word, not a product: ABC is not CAB
_FORMULA_OF_CHEMISTRY = re.compile(r"\d*(?:\(?[A-Z][a-z]?\)?(?:_\{?\d+\}?)?){2,}")
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|smallmatrix|array|vmatrix)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", re.DOTALL)


def canonical_key(answer: str) -> Key:
    """Return the key of an answer. It depends on nothing but the text."""
    answer = answer.strip()
    if len(answer) > MAX_LENGTH:
        return ("text", " ".join(answer.split()))
    try:
        return _key_of_short(answer)
    except NoVerdictError:  # for now; a later question may be answered
        return text_key(normal_form(answer))


@lru_cache(maxsize=1 << 16)
def _key_of_short(answer: str) -> Key:
    text = normal_form(answer)
    part = read_part(text)
    return text_key(text or answer) if part is None else key_of(part)


def text_key(text: str) -> Key:
    """Return the key of a text: whatever its case, and without spaces that do not separate digits."""
    plain = re.sub(r"\s+", " ", text.replace("\x01", "")).casefold().strip(" .,;:")
    return ("text", _NO_DIFFERENCE.sub("", plain) or text)


def key_of(part: Part) -> Key:
    """Return the key of a whole answer."""
    if part.intervals is not None:
        return set_key(part.intervals)
    return part.keys[0] if len(part.keys) == 1 else collection_key(part.keys, distinct=True)


def collection_key(keys: tuple[Key, ...], *, distinct: bool) -> Key:
    """Return the key of a set or a list, in which the order does not count; a single element is itself."""
    ordered = sorted(dict.fromkeys(keys) if distinct else keys, key=repr)
    return ordered[0] if len(ordered) == 1 else ("collection", *ordered)


def read_part(text: str, *, depth: int = 0) -> Part | None:
    """Return what a text in normal form says, or None where it is only a text."""
    text = trimmed(text)
    if not text or depth > 8 or not is_balanced(text):
        return _choice(text)
    if part := _choice(text) or _clock(text) or _alias(text) or _without_remark(text, depth):
        return part
    text = join_thousands(text)
    for structured in (_compound, _matrix, _in_words, _listed, _related, _set_operation, _bracketed, _value, _ratio):
        try:
            part = structured(text, depth)
        except (UnreadError, UncertainError, NotReadError, RecursionError):
            continue
        if part is not None:
            return part
    return None


def _one(key: Key) -> Part:
    return Part((key,))


def _choice(text: str) -> Part | None:
    if match := _CHOICE.fullmatch(text.replace("\x01", "")):
        letter = match[1] or match[2]
        return _one(("choice", letter.upper()))
    if match := _CHOICE_WITH_TEXT.fullmatch(text):
        return _one(("choice", match[1] or match[2]))
    return None


def _clock(text: str) -> Part | None:
    if (match := _CLOCK.fullmatch(text)) and 1 <= int(match[1]) <= 12:
        hour = int(match[1]) % 12 + (12 if match[4].lower() == "p" else 0)
        return _one(("time", hour, int(match[2] or 0), int(match[3] or 0)))
    if match := _NOON.fullmatch(text):
        return _one(("time", 12 if match[1].lower() == "noon" else 0, 0, 0))
    if match := _PLAIN_CLOCK.fullmatch(text):
        hour = int(match[1])
        return _one(("time" if hour > 12 or (len(match[1]) == 2 and hour == 0) else "clock", hour, int(match[2]), 0))
    return None


def _alias(text: str) -> Part | None:
    key = _ALIASES.get(re.sub(r"\s+", "", text).lower())
    if key is None:
        return None
    return Part((key,), intervals=REALS if key == set_key(REALS) else None)


def _without_remark(text: str, depth: int) -> Part | None:
    """Read an answer without "approximately" before it or a remark in parentheses after it that says the same again."""
    if match := _APPROXIMATELY.match(text):
        return read_part(text[match.end() :], depth=depth + 1)
    if not (match := _REMARK.fullmatch(text)):
        return None
    main, remark = match[1], match[2].strip()
    part = read_part(main, depth=depth + 1)
    if part is None:
        return None
    again = read_part(_RESTATED.sub("", remark), depth=depth + 1)
    said_again = again is not None and key_of(again) == key_of(part) and not re.fullmatch(r"[a-z]{1,3}", remark)
    return part if said_again or _NO_REMARK.fullmatch(remark) or _is_unit(remark) else None


def _is_unit(text: str) -> bool:
    return len(text) > 1 and read_unit(tokens_of(text)) is not None


def _compound(text: str, depth: int) -> Part | None:
    found = compound(text)
    return None if found is None else _one(("quantity", *found))


def _listed(text: str, depth: int) -> Part | None:
    texts, joined = split_list(text)
    if len(texts) < 2:
        return None
    parts = [read_part(each, depth=depth + 1) or _one(text_key(each)) for each in texts if each]
    if len(parts) < 2:
        return parts[0] if parts else None
    if any(each == "…" for each in texts):  # the order tells how it goes on
        return _one(("sequence", *(key_of(part) for part in parts)))
    if all(part.intervals is not None for part in parts) and joined in ("or", "and"):
        sets = [part.intervals or () for part in parts]
        whole = list(sets[0])
        for each in sets[1:]:
            whole = union([*whole, *each]) if joined == "or" else intersection(whole, each)
        return Part((), intervals=tuple(whole))
    names = [part.name for part in parts]
    if None not in names and len(set(names)) == len(names):
        return _one(named_key([(str(part.name), key_of(part)) for part in parts]))
    if any(names[1:]) and len(set(names)) > 1:
        return _one(("collection", *sorted(((part.name, key_of(part)) for part in parts), key=repr)))
    keys = tuple(_elements(parts))
    return Part((collection_key(keys, distinct=False),), name=names[0])


def _elements(parts: list[Part]) -> list[Key]:
    """Return the elements' keys; units count where they differ: 2 cm and 3 kg are not 3 cm and 2 kg."""
    units = {part.unit for part in parts if part.unit is not None}
    if len(units) > 1:
        return [("with unit", key_of(part), part.unit) for part in parts]
    return [key for part in parts for key in (part.keys if part.intervals is None else (key_of(part),))]


def named_key(values: list[tuple[str, Key]]) -> Key:
    """Return the key of named values: of x, y and z, or other letters in a row, it is the tuple's."""
    values = sorted(values)
    names = [name for name, _ in values]
    in_a_row = all(len(name) == 1 for name in names) and all(ord(b) - ord(a) == 1 for a, b in itertools.pairwise(names))
    return tuple_key([key for _, key in values]) if in_a_row and names[0].islower() else ("named", *values)


def tuple_key(keys: list[Key]) -> Key:
    """Return the key of a tuple; a pair's is that of the open interval, which is written alike."""
    if len(keys) == 2:
        return ("interval", "(", *keys, ")")
    return ("tuple", *keys)


def _related(text: str, depth: int) -> Part | None:
    return relations.read_relation(text, lambda side: read_part(side, depth=depth + 1))


def _set_operation(text: str, depth: int) -> Part | None:
    texts = split_top(text, _SET_OPERATION)
    if len(texts) < 2:
        return None
    signs = [sign for sign in text if sign in "∪∩∖"]
    if len(signs) != len(texts) - 1:
        return None
    whole: list[Interval] | None = None
    for each, sign in zip(texts, ["∪", *signs], strict=True):
        part = read_part(each, depth=depth + 1)
        found = None if part is None else part.intervals if part.intervals is not None else points(_members(part))
        if found is None:
            return None
        if whole is None:
            whole = list(found)
        elif sign == "∪":
            whole = union([*whole, *found])
        else:
            whole = intersection(whole, found if sign == "∩" else complement(found))
    return Part((), intervals=tuple(whole or ()))


def _members(part: Part) -> list[Key]:
    return list(part.keys[0][1:]) if part.keys and part.keys[0][0] == "collection" else list(part.keys)


def _bracketed(text: str, depth: int) -> Part | None:
    found = inside(text)
    if found is None:
        return None
    opening, content, closing = found
    if (opening, closing) == (SET_OPEN, SET_CLOSE):
        return _set(content, depth)
    parts = [read_part(each, depth=depth + 1) for each in split_top(content, re.compile(r"[,;]"))]
    keys = [key_of(part) for part in parts if part is not None]
    if len(keys) != len(parts):
        raise NotReadError(text)
    if len(keys) == 1 and (opening, closing) == ("(", ")"):
        return parts[0]
    if len(keys) == 2 and opening in "([" and closing in ")]":
        low, high = end(keys[0], opening == "["), end(keys[1], closing == "]")
        if low is not None and high is not None and low.place < high.place:
            return Part((set_key([Interval(low, high)]),), intervals=(Interval(low, high),))
        return _one(("interval", opening, *keys, closing))
    kind = {"()": "tuple", "⟨⟩": "tuple", "[]": "row"}.get(opening + closing)
    if kind is None:
        raise NotReadError(text)
    return _one((kind, *keys))


def _set(content: str, depth: int) -> Part | None:
    if match := re.fullmatch(r"[A-Za-z](?:\s*∈\s*ℝ)?\s*[|:]\s*(.*)", content):  # {x | x > 2}
        return read_part(match[1], depth=depth + 1)
    texts, _ = split_list(content)
    parts = [read_part(each, depth=depth + 1) or _one(text_key(each)) for each in texts if each]
    if not parts:
        return _one(("empty",))
    if any(each == "…" for each in texts):
        return _one(("sequence", *(key_of(part) for part in parts)))
    return Part((collection_key(tuple(_elements(parts)), distinct=True),), in_braces=True)


def _value(text: str, depth: int) -> Part | None:
    if _DASHED_DIGITS.fullmatch(text) or _ONLY_LETTERS.fullmatch(text) or _FORMULA_OF_CHEMISTRY.fullmatch(text):
        return None
    if is_symbolic(text):
        form = closed_form(text)
        if form is None:
            raise NotReadError(text)
        text = normal_form(form)
    quantity = read_quantity(text)
    keys = tuple(value_keys(quantity.node))
    return Part(keys, unit=quantity.unit)


def _ratio(text: str, depth: int) -> Part | None:
    sides = split_top(text, _RATIO)
    if len(sides) < 2:
        return None
    if re.match(r"[^\W\d]", sides[0]) and len(sides) == 2:
        part = read_part(sides[1], depth=depth + 1)
        return None if part is None else part._replace(name=sides[0].casefold())
    parts = [read_part(each, depth=depth + 1) for each in sides]
    keys = [key_of(part) for part in parts if part is not None]
    if len(keys) < len(sides):
        return None
    if all(key[0] == "number" for key in keys) and keys[0][1] != 0:
        keys = [number_key(key[1] / keys[0][1]) for key in keys]
    return _one(("ratio", *keys))


def _in_words(text: str, depth: int) -> Part | None:
    """Read a number in words, with or without a unit: forty-two, twelve dollars."""
    value = number_in_words(text)
    if value is None:
        number, _, unit = text.rpartition(" ")
        value = number_in_words(number) if number and _is_unit(unit) else None
    return None if value is None else _one(number_key(value))


def _matrix(text: str, depth: int) -> Part | None:
    match = _MATRIX.fullmatch(text)
    if match is None or match[1] == "vmatrix":
        return None
    lines = [row.split("&") for row in match[2].split("\\\\") if row.strip()]
    rows = [[read_part(cell, depth=depth + 1) or _one(text_key(cell)) for cell in row] for row in lines]
    if len(rows) == 1 and len(rows[0]) == 1:
        return rows[0][0]
    return _one(("matrix", *(tuple(key_of(cell) for cell in row) for row in rows)))
