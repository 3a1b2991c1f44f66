"""The standard error of an accuracy, and of the difference between two accuracies on the same prompts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

ERRORS = 2.0
"""Standard errors that a difference must exceed to be called one. A difference of 2 comes by chance once in twenty."""


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of one value per prompt; None for fewer than two prompts, which do not show their spread.

    The prompts are the independent draws. Responses to the same prompt resemble each other, so their number does not divide the error.
    """
    return None if len(values) < 2 else statistics.stdev(values) / math.sqrt(len(values))


def paired_change(before: Sequence[float], after: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean difference between two evaluations of the same prompts, and its standard error.

    What makes a prompt easy or hard is in both values and cancels, so the error is smaller than those of the two means suggest.
    """
    differences = [b - a for a, b in zip(before, after, strict=True)]
    return math.fsum(differences) / len(differences), standard_error(differences)


def is_beyond(change: float, error: float | None) -> bool:
    """Return whether a change is larger than chance explains."""
    return error is not None and abs(change) > ERRORS * error


def with_error(value: float, error: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """Return a value with its standard error as text: 0.412 ± 0.021."""
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"
