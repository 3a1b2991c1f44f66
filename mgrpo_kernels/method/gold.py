"""True answers, where the data has them: reading and comparing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mgrpo_kernels.vote import Equivalence, answers_equal, extract_answer

ANSWER_FIELDS = ("answer", "solution")
"""What the field with the true answer may be called where no option names it."""
LONGEST_ANSWER = 256
"""Characters. A longer text in which no answer is marked is a solution that forgot to, not an answer."""


def read_gold(text: str) -> str | None:
    """Return the true answer in a field: what a solution marks as its answer, or the text itself, unless that is too long for one."""
    return extract_answer(text) or (text.strip() if len(text.strip()) <= LONGEST_ANSWER else None)


def equal_to_gold(answers: Sequence[str | None], gold: Sequence[str | None], equivalence: Equivalence) -> Tensor:
    """Return 1 where an answer equals the true one, 0 where not, NaN where that is not known: ``(B,)`` float32."""
    pairs = list(zip(answers, gold, strict=True))
    known = {
        (a, g): math.nan if g is None else float(answers_equal(a, g, equivalence)) for a, g in dict.fromkeys(pairs)
    }
    return torch.tensor([known[pair] for pair in pairs], dtype=torch.float32)
