"""Whether two answers are equal."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from mgrpo_kernels import checks
from mgrpo_kernels.vote.extraction import marked_answer
from mgrpo_kernels.vote.keys import MAX_LENGTH, canonical_key
from mgrpo_kernels.vote.normal import normal_form
from mgrpo_kernels.vote.values import Key

EQUIVALENCES = ("math", "exact")
Equivalence = str | Callable[[str, str], bool]
"""One of :data:`EQUIVALENCES`, or a function."""


def math_key(answer: str) -> Key:
    """Return the canonical key of an answer, or of the answer that it marks where it is a whole sentence or response."""
    return canonical_key(marked_answer(answer) or _marked_in_text(answer) or answer)


def _marked_in_text(answer: str) -> str | None:
    return marked_answer(normal_form(answer)) if "\\text" in answer and len(answer) <= MAX_LENGTH else None


KEYS: dict[str, Callable[[str], Hashable]] = {"math": math_key, "exact": str}
"""What answers have in common that are equal."""


def answers_equal(a: str | None, b: str | None, equivalence: Equivalence = "math") -> bool:
    r"""Return whether two answers are equal; None and empty answers are equal to nothing.

    As mathematics ("math"), two answers are equal if they have the same canonical key: the exact number, in any spelling
    (``1/2``, ``0.5``, ``\frac12``, ``50%``, ``1{,}000``, ``2.5 million``, ``12 cm``), the same function for formulas, the same
    interval, tuple, set, list, equation, choice or time; texts whatever their case. An answer that is not understood to its
    last character is a text. The relation is an equivalence; docs/ops/vote.md has its rules as a table.

    Args:
        a: one answer; the first of its cluster where `equivalence` is a function.
        b: the other.
        equivalence: "math", "exact" (the same characters), or a function (a, b) -> bool.

    Raises:
        TypeError: an answer is no string, `equivalence` is of another kind, or the function returns no bool.
        ValueError: no such equivalence.
        ImportError: an answer has an integral, sum, product or limit, and math-verify is not installed.
    """
    for name, answer in (("a", a), ("b", b)):
        if answer is not None and not isinstance(answer, str):
            raise TypeError(f"{name}: expected a string or None, got {type(answer).__name__}")
    check_equivalence(equivalence)
    if a is None or b is None or not a.strip() or not b.strip():
        return False
    if isinstance(equivalence, str):
        return a == b or KEYS[equivalence](a) == KEYS[equivalence](b)
    return verdict(equivalence, a, b)


def check_equivalence(equivalence: Equivalence) -> None:
    """Raise ValueError or TypeError for what is no equivalence."""
    if isinstance(equivalence, str):
        checks.check_choice("equivalence", equivalence, EQUIVALENCES)
    elif not callable(equivalence):
        raise TypeError(f"equivalence: expected 'math', 'exact' or a function, got {type(equivalence).__name__}")


def verdict(equivalence: Callable[[str, str], bool], first: str, new: str) -> bool:
    """Return what a function says of two answers."""
    same = equivalence(first, new)
    if not isinstance(same, bool):  # a function without a return would make every answer different
        raise TypeError(f"equivalence: expected a function that returns a bool, got {type(same).__name__}")
    return same
