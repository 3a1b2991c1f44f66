"""Brackets, separators and thousands: how an answer in normal form divides into parts."""

from __future__ import annotations

import itertools
import re

OPENING, CLOSING = "([{⦃⟨", ")]}⦄⟩"
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_AND = re.compile(r",?\s+(?:and|or)\s+|\s*&\s*|\s*;\s*|\s*,\s*(?:and|or)\s+")
_COMMA = re.compile(r"\s*,\s*")


def is_balanced(text: str) -> bool:
    """Return whether every bracket is closed. ``[1,2)`` is: an interval's brackets may differ."""
    depth = 0
    for character in text:
        if character in OPENING:
            depth += 1
        elif character in CLOSING:
            depth -= 1
            if depth < 0:
                return False
    return depth == 0


def depths(text: str) -> list[int]:
    """Return how many brackets are open at each character; a bracket itself counts as inside."""
    depth, found = 0, []
    for character in text:
        if character in OPENING:
            depth += 1
        found.append(depth)
        if character in CLOSING:
            depth -= 1
    return found


def join_thousands(text: str) -> str:
    """Remove thousands separators: ``1,234`` is a number, ``1, 234`` two, and so are the numbers of ``(1,234)``.

    Inside brackets a comma separates, unless another one there has a space after it: ``(1,000, 2,000)``.
    """
    if not re.search(r"\d,\d{3}", text):
        return text
    bracket: list[int] = []  # the position of the bracket around each character, -1 for none
    open_brackets: list[int] = []
    for at, character in enumerate(text):
        if character in CLOSING and open_brackets:
            open_brackets.pop()
        bracket.append(open_brackets[-1] if open_brackets else -1)
        if character in OPENING:
            open_brackets.append(at)
    spaced = {bracket[at] for at, pair in enumerate(itertools.pairwise(text)) if pair == (",", " ")}
    spaced |= {at for at, character in enumerate(text) if character == "{"} | {-1}
    return _THOUSANDS.sub(
        lambda match: match[0].replace(",", "") if bracket[match.start()] in spaced else match[0], text
    )


def split_top(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split a text at the separators that stand outside all brackets."""
    level = depths(text)
    parts, start = [], 0
    for match in separator.finditer(text):
        if level[match.start()] == 0 and match.end() > match.start():
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def split_list(text: str) -> tuple[list[str], str]:
    """Split a list at its commas, semicolons, "and" and "or"; return its parts and the word that joins them ("," for none)."""
    words = split_top(text, _AND)
    joined = next((word for word in ("or", "and") if len(words) > 1 and re.search(rf"\b{word}\b", text)), ",")
    parts = [part for each in words for part in split_top(each, _COMMA)]
    return [part.strip() for part in parts], joined


def inside(text: str) -> tuple[str, str, str] | None:
    """Return (opening bracket, content, closing bracket) where one pair of brackets encloses the whole text."""
    if len(text) < 2 or text[0] not in OPENING or text[-1] not in CLOSING:
        return None
    return (text[0], text[1:-1].strip(), text[-1]) if _one_pair(text) else None


def _one_pair(text: str) -> bool:
    depth = 0
    for at, character in enumerate(text):
        depth += (character in OPENING) - (character in CLOSING)
        if depth == 0:
            return at == len(text) - 1
    return False
