"""True answers, where the data has them: reading and comparing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels.vote import Equivalence, answers_equal
from mgrpo_kernels.vote.extraction import last_box
from mgrpo_kernels.vote.normal import without_delimiters
from mgrpo_kernels.vote.phrases import without_count

ANSWER_FIELDS = ("answer", "solution")
"""What the field with the true answer may be called where no option names it."""
LONGEST_ANSWER = 256
"""Characters. A longer text in which no answer is marked is a solution that forgot to, not an answer."""

Gold = str | tuple[str, ...]
"""A true answer, or several of which any will do."""

_HASHES = re.compile(r"(?<!#)####(?!#)[^\S\n]*([^\n]*\S)")
_PERCENT = re.compile(r"(.*\d)\s*(?:\\?%|percent)")


def read_gold(text: str) -> str | None:
    r"""Return the true answer in a field: what ``\boxed{}`` or ``####`` marks in a solution, or the text itself, unless that is too long.

    A true answer is no response: "a: 3, b: 4" is one as it stands.
    """
    marked = last_box(text, open_too=False) or next(
        (without_delimiters(match[1]) for match in reversed(list(_HASHES.finditer(text)))), None
    )
    if marked:
        return marked
    return text.strip() if 0 < len(text.strip()) <= LONGEST_ANSWER else None


def gold_in_cell(value: Any) -> Gold | None:
    """Return the true answer in a cell of a table, or several where it is a list; None where it is empty or not a number (NaN).

    Raises:
        TypeError: it is neither a text nor a number nor a list of these.
    """
    if hasattr(value, "tolist"):  # of NumPy
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        found = tuple(dict.fromkeys(each for one in value for each in _several(gold_in_cell(one))))
        return (found[0] if len(found) == 1 else found) if found else None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, (str, int, float)):
        raise TypeError(f"expected a text, a number or a list of them as the true answer, got {value!r:.100}")
    return read_gold(str(value))


def _several(gold: Gold | None) -> tuple[str, ...]:
    return () if gold is None else (gold,) if isinstance(gold, str) else gold


def equal_to_gold(answers: Sequence[str | None], gold: Sequence[Gold | None], equivalence: Equivalence) -> Tensor:
    """Return 1 where an answer is right, 0 where not, NaN where that is not known: ``(B,)`` float32.

    An answer is right if it equals the true one, or one of several. As mathematics, what is counted need not be said ("7 apples"), and
    a percentage may also be given as its number: where 20 is true, 20% is right, and the other way round, although in a vote 20% is 0.2.
    """
    pairs = list(zip(answers, gold, strict=True))
    known = {(a, g): math.nan if g is None else float(_is_right(a, g, equivalence)) for a, g in dict.fromkeys(pairs)}
    return torch.tensor([known[pair] for pair in pairs], dtype=torch.float32)


def _is_right(answer: str | None, gold: Gold, equivalence: Equivalence) -> bool:
    golds = _several(gold)
    if answer is None or equivalence != "math":
        return any(answers_equal(answer, each, equivalence) for each in golds)
    truths = [spelling for each in golds for spelling in _spellings(each)]
    return any(answers_equal(a, g) for a in _spellings(answer) for g in truths)


def _spellings(answer: str) -> list[str]:
    """Return an answer as it stands, without what is counted, and a percentage as its number."""
    found = [answer, without_count(answer)]
    if match := _PERCENT.fullmatch(answer.strip()):
        found.append(match[1])
    return list(dict.fromkeys(found))
