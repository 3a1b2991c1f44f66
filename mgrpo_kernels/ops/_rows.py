"""Which rows pass through the matmuls of a head: those that a mask counts, and in the backward pass those with a gradient.

The host knows how many these are if it can read the mask without waiting, which is on a CPU, or if the caller gives the number. Otherwise
all rows are multiplied. Which rows they are stays on the device: a stable sort of the mask, whose result has a known size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """The rows that a mask counts."""

    rows: Tensor | None  # (number,), ascending; None: all
    number: int  # of them; all, where the host does not know
    masked: bool  # whether masked rows may be among them
    wrong: Tensor | None  # 0-d bool: the caller's number is not the mask's; None: the host knows that it is


def can_read(device: torch.device) -> bool:
    """Return whether the host reads a value of this device without waiting for it."""
    return device.type == "cpu"


def check_counts(mask: Tensor | None, number: int, unmasked_tokens: Any, tokens_with_gradient: Any) -> None:
    """Check the numbers of tokens that a caller may give against the number of all. What a mask holds is checked by the ops."""
    for name, count in (("unmasked_tokens", unmasked_tokens), ("tokens_with_gradient", tokens_with_gradient)):
        if count is None:
            continue
        if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
            raise TypeError(f"{name}: expected an int or None, got {type(count).__name__}")
        if not 0 <= count <= number:
            raise ValueError(f"{name}: expected 0 to {number}, the number of tokens, got {count}")
    if mask is None and unmasked_tokens is not None and unmasked_tokens != number:
        raise ValueError(
            f"unmasked_tokens: expected {number}, the number of tokens, without a mask, got {unmasked_tokens}"
        )


def kept_rows(mask: Tensor | None, number: int, unmasked_tokens: int | None, *, debug: bool = False) -> Kept:
    """Return the rows out of `number` that `mask` counts, `unmasked_tokens` as the caller says.

    Raises:
        ValueError: on a CPU and with `debug`, the mask counts another number.
    """
    if mask is None:
        return Kept(None, number, masked=False, wrong=None)
    count, readable, wrong = unmasked_tokens, can_read(mask.device), None
    if readable or (debug and count is not None):
        count = int(mask.sum())
        if unmasked_tokens not in (None, count):
            raise ValueError(
                f"unmasked_tokens: expected {count}, the number of True in mask, got {unmasked_tokens}: "
                "pass that number, or None"
            )
    elif count is not None:
        wrong = mask.sum() != count
    if count is None:
        return Kept(None, number, masked=True, wrong=None)
    count = count if readable else _at_least_one(count, number)
    return Kept(None if count == number else first_rows(count, mask), count, masked=not readable, wrong=wrong)


def number_with_gradient(live: Tensor, kept: Kept, tokens_with_gradient: int | None) -> tuple[int, Tensor | None]:
    """Return how many rows the backward pass needs, out of `live` ``(N,)``, and whether the caller's number is too low (0-d bool).

    Raises:
        ValueError: on a CPU, more rows are live than the caller says.
    """
    if can_read(live.device):
        found = int(live.sum())
        if tokens_with_gradient is not None and found > tokens_with_gradient:
            raise ValueError(
                f"tokens_with_gradient: expected at least {found}, the number of tokens that have a gradient, "
                f"got {tokens_with_gradient}: a KL penalty or an entropy bonus gives every unmasked token one, "
                "and so does NaN, in a token's statistics or in the gradient of them"
            )
        return found, None
    if tokens_with_gradient is None:
        return kept.number, None
    return _at_least_one(min(tokens_with_gradient, kept.number), live.shape[0]), live.sum() > tokens_with_gradient


def _at_least_one(count: int, number: int) -> int:
    """Return the count, or 1 where there are rows: one carries the NaN that a wrong count gives on a GPU into every gradient."""
    return max(count, min(1, number))


def first_rows(count: int, *sets: Tensor | None) -> Tensor:
    """Return `count` rows: those in the most of the `sets` ``(N,)`` bool first, and otherwise in order. The host does not wait."""
    members = torch.stack([each for each in sets if each is not None]).sum(0, dtype=torch.int32)
    return members.argsort(descending=True, stable=True)[:count]


def take(value: Any, rows: Tensor | slice | None) -> Any:
    """Return these rows of a tensor; anything else, and everything for None, as it is."""
    return value[rows] if isinstance(value, Tensor) and rows is not None else value


def take_hidden(hidden: Tensor, rows: Tensor | None, mask: Tensor | None, kept: Kept) -> Tensor:
    """Return these rows of the hidden states, and 0 in masked ones: 0 x NaN would reach the weight's gradient."""
    taken: Tensor = take(hidden, rows)
    return torch.where(take(mask, rows).unsqueeze(-1), taken, 0.0) if kept.masked else taken


def put_back(values: Tensor, rows: Tensor | None, number: int) -> Tensor:
    """Return a tensor of `number` rows: `values` in these rows (None: all) and 0 in others."""
    return values if rows is None else values.new_zeros(number, *values.shape[1:]).index_copy_(0, rows, values)


def spoil(values: Tensor, *wrong: Tensor | None) -> Tensor:
    """Return `values`, or NaN everywhere if one of `wrong` (0-d bool) is True. Where all are None, nothing is computed."""
    for each in wrong:
        if each is not None:
            values = torch.where(each, torch.nan, values)
    return values
