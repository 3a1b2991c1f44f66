"""A question's second wording in the rows of a data set, for the methods that ask a question in two wordings."""

from __future__ import annotations

from typing import Any


def second_wording(prompt: Any, other: Any, column: str) -> Any:
    """Return the second wording in the form of `prompt`, which is a text or messages.

    `other`, the row's value of the column, has this form; or it is a text that takes the place of the last message's.

    Raises:
        ValueError: it is neither.
    """
    is_text = isinstance(prompt, str)
    if isinstance(other, str) and other.strip():
        return other if is_text else [*prompt[:-1], {**prompt[-1], "content": other}]
    if isinstance(other, (list, tuple)) and other and not is_text:
        return list(other)
    raise ValueError(
        f"paraphrase_field: expected {'a text' if is_text else 'messages or a text'} in the column {column!r} of every row, got {other!r} "
        f"with the prompt {prompt!r}"
    )
