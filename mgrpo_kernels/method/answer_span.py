"""Which tokens of a response spell its final answer."""

from __future__ import annotations

import functools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mgrpo_kernels.vote.extraction import answer_place


def answer_tokens(
    tokens: Sequence[Sequence[int]],
    texts: Sequence[str],
    answers: Sequence[str | None],
    decode: Callable[[list[int]], str],
    width: int,
) -> Tensor:
    """Return which tokens spell the final answers, ``(B, width)`` bool; none of them where the text does not have the answer literally.

    A token that spells a part of the answer and something else belongs to the answer.

    Args:
        tokens: B responses.
        texts: what `decode` returns for each of them.
        answers: their answers, None for a response without one.
        decode: token ids -> text. It is called for the first tokens of a response, about 2 log2 L times for L tokens.
        width: number of columns, at least the length of the longest response.
    """
    found = torch.zeros(len(tokens), width, dtype=torch.bool)
    known: dict[tuple[tuple[int, ...], str | None], slice] = {}
    for row, (ids, text, answer) in enumerate(zip(tokens, texts, answers, strict=True)):
        key = tuple(ids), answer
        if key not in known:
            known[key] = _span(list(ids), text, answer, decode)
        found[row, known[key]] = True
    return found


def _span(ids: list[int], text: str, answer: str | None, decode: Callable[[list[int]], str]) -> slice:
    place = None if answer is None else answer_place(text, answer)
    if place is None:
        return slice(0, 0)

    @functools.cache
    def characters(number: int) -> int:
        """Return how many characters the first tokens spell."""
        return len(decode(ids[:number]))

    # The last prefix that ends at or before the answer's first character, and the first that ends at or behind its last one.
    first = bisect_right(range(len(ids) + 1), place[0], key=characters) - 1
    return slice(max(first, 0), bisect_left(range(len(ids) + 1), place[1], key=characters))
