r"""Integrals, sums, products and limits: a worker process evaluates them to a formula that :mod:`mgrpo_kernels.vote.formulas` reads.

SymPy may take any time and memory, so it works in a process that is limited in both and can be killed. All other answers are read
without it.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator

from mgrpo_kernels._math_worker import MathWorker
from mgrpo_kernels.vote.normal import COMMAND_OF

logger = logging.getLogger("mgrpo_kernels")

_SYMBOLIC = re.compile(r"\\(?:int|iint|sum|prod|lim)(?![A-Za-z])")
_worker = MathWorker()
_known: dict[str, str | None] = {}  # closed forms, and None for what has none; no missing verdict
_MAX_KNOWN = 1 << 14


class NoVerdictError(Exception):
    """The worker had no time left, stalled or died: whether there is a closed form is not known."""


class _Budget:
    """The time that is left for the questions of one vote."""

    deadline: float | None = None
    refused = 0


_budget = _Budget()


def is_symbolic(text: str) -> bool:
    """Return whether a text in normal form has an operation that only the worker evaluates."""
    return _SYMBOLIC.search(text) is not None


@contextlib.contextmanager
def budget(seconds: float) -> Iterator[None]:
    """Limit the time that the worker may take for everything asked in this block; report what went unanswered at its end.

    Within another such block there is no limit but that block's.
    """
    if _budget.deadline is not None:
        yield
        return
    _budget.deadline = time.monotonic() + seconds
    try:
        yield
    finally:
        if _budget.refused:
            logger.warning(
                "majority_vote: the time for formulas, %g s, is used up: %d answers were compared as texts; "
                "vote_seconds sets the time",
                seconds,
                _budget.refused,
            )
        _budget.deadline, _budget.refused = None, 0


def closed_form(text: str) -> str | None:
    """Return the closed form of a formula in normal form, or None where SymPy finds none.

    Raises:
        NoVerdictError: there was no time, or the worker failed; nothing is remembered then.
        ImportError: math-verify, whose LaTeX parser the worker uses, is not installed.
    """
    if text in _known:
        return _known[text]
    left = None if _budget.deadline is None else _budget.deadline - time.monotonic()
    if left is not None and left <= 0:
        _budget.refused += 1
        raise NoVerdictError(text)
    answered, form = _worker.evaluate(_latex(text), left)
    if not answered:
        _budget.refused += 1
        raise NoVerdictError(text)
    if len(_known) >= _MAX_KNOWN:
        _known.clear()
    _known[text] = form
    return form


def _latex(text: str) -> str:
    return "".join(COMMAND_OF.get(character, character) for character in text)
