"""The fields of a row: question and true answers. A dot in a field's name leads into an object: reward_model.ground_truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from mgrpo_kernels.method import ANSWER_FIELDS, Gold, read_gold
from mgrpo_kernels.train.data.files import Row, shown
from mgrpo_kernels.train.data.log import log_info
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model.chat import Turn

FIELDS = {
    "prompt_field": ("question", "prompt", "problem"),
    "answer_field": ANSWER_FIELDS,
    "paraphrase_field": ("paraphrase", "rephrased_question", "rewritten_question"),
}
"""What a field may be called where no option names it: the first where there is one, else the others, if it is one of them."""


ROLES = ("system", "user", "assistant", "tool", "developer")


def lookup(values: Mapping[str, Any], name: str) -> Any:
    """Return a row's field, or None: by its name, or by the path to it with dots between."""
    if name in values:
        return values[name]
    first, dot, rest = name.partition(".")
    inner = values.get(first) if dot else None
    return lookup(inner, rest) if isinstance(inner, Mapping) else None


def _has(rows: Sequence[Row], name: str) -> bool:
    return any(name in row.values or lookup(row.values, name) is not None for row in rows)


def find_field(option: str, given: str | None, rows: Sequence[Row], source: str, *, needed: bool) -> str:
    """Return the field that the option names; where it names none the usual one, or with a word in the log the only one like it.

    Raises:
        UsageError: it is needed, and not there; or more than one is like it.
    """
    usual, *others = FIELDS[option]
    alike = [name for name in others if _has(rows, name)]
    if given is None and not _has(rows, usual) and alike:
        if len(alike) > 1:
            raise UsageError(
                f"{option}: expected the name of a field of {source}, which has {' and '.join(alike)}, got none"
            )
        log_info("%s: %s, since %s has no %s", option, alike[0], source, usual)
        return alike[0]
    name = usual if given is None else given
    if needed and not _has(rows, name):
        _value(rows[0], option, name)
    return name


def question_in(row: Row, name: str, option: str = "prompt_field") -> str | tuple[Turn, ...]:
    """Return a row's question, in the field of this option: a text, or a conversation that ends with the user's turn.

    Raises:
        UsageError: it has none, or something else.
    """
    value = _value(row, option, name)
    if not isinstance(value, (list, tuple)) or not all(isinstance(each, Mapping) for each in value):
        return _text_of(value, row, option, name)
    turns = tuple(_turn(each, row, name, option) for each in value)
    if not turns or turns[-1].role != "user":
        got = f"{len(turns)} messages, the last of {turns[-1].role}" if turns else "none"
        raise UsageError(
            f"{option}: expected messages that end with the user's in {name!r} of {row.location}, got {got}"
        )
    return turns


def gold_in(row: Row, name: str) -> Gold | None:
    """Return a row's true answer, or several where the field is a list; None where none can be read.

    Raises:
        UsageError: the field has something else.
    """
    value = _value(row, "answer_field", name)
    if not isinstance(value, (list, tuple)):
        return read_gold(_text_of(value, row, "answer_field", name))
    golds = [read_gold(_text_of(each, row, "answer_field", name)) for each in value]
    found = tuple(dict.fromkeys(gold for gold in golds if gold is not None))
    return (found[0] if len(found) == 1 else found) if found else None


def _value(row: Row, option: str, name: str) -> Any:
    value = lookup(row.values, name)
    if value is None and name not in row.values:
        raise UsageError(
            f"{option}: expected one of the fields {', '.join(sorted(row.values)) or '(none)'} of {row.location}, got {name!r}"
        )
    return value


def _turn(message: Any, row: Row, name: str, option: str) -> Turn:
    role, content = (message.get(key) for key in ("role", "content")) if isinstance(message, Mapping) else (None, None)
    if isinstance(content, (list, tuple)):  # parts, of which texts are understood
        parts = [each.get("text") if isinstance(each, Mapping) else each for each in content]
        content = "".join(map(str, parts)) if parts and all(isinstance(each, str) for each in parts) else None
    if role not in ROLES or not isinstance(content, str):
        raise UsageError(
            f"{option}: expected messages of the form {{role, content}} with a role of {', '.join(ROLES)} and a text in {name!r} of "
            f"{row.location}, got {shown(message)}"
        )
    return Turn(role, _text_of(content, row, option, name) if role == "user" else content)


def _text_of(value: Any, row: Row, option: str, name: str) -> str:
    fine = isinstance(value, (str, int, float, Decimal)) and not isinstance(value, bool) and str(value).strip()
    if not fine or (isinstance(value, (float, Decimal)) and not math.isfinite(value)):
        raise UsageError(f"{option}: expected a text or a number in {name!r} of {row.location}, got {shown(value)}")
    text = str(value)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError(
            f"{option}: expected a text in {name!r} of {row.location}, got half a surrogate pair in {shown(text)}"
        )
    return text
