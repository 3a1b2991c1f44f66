"""The columns of a data set that MGRPOTrainer reads beside the prompt: the true answer, and the question in another wording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mgrpo_kernels.integrations.trl.config import MGRPOConfig
from mgrpo_kernels.integrations.wordings import second_wording
from mgrpo_kernels.method import Gold, gold_in_cell
from mgrpo_kernels.train.data.fields import FIELDS


def columns_of(args: MGRPOConfig, uses_method_rewards: bool, dataset: Any) -> tuple[str | None, str | None]:
    """Return the columns with the true answers and with the second wordings; None for one that there is not.

    Raises:
        ValueError: a column that is named, or needed, is missing.
    """
    options = args.method_options()
    needs_gold = uses_method_rewards and (options.row.needs_gold or options.gold_labels)
    asks_twice = options.row.second_wording != "no"
    return (
        find_column("answer_field", args.answer_field, dataset, needed=needs_gold),
        find_column("paraphrase_field", args.paraphrase_field, dataset, needed=asks_twice),
    )


def find_column(option: str, given: str | None, dataset: Any, *, needed: bool) -> str | None:
    """Return the column that an option names, or the first of the usual ones that there is; None if there is none."""
    columns = getattr(dataset, "column_names", None)
    if columns is None and given is not None:  # a stream, which does not say what columns it has
        return given
    names = FIELDS[option] if given is None else (given,)
    found = next((name for name in names if name in (columns or ())), None)
    if found is None and (given is not None or needed):
        raise ValueError(f"{option}: expected one of the columns {', '.join(columns or ())}, got {given!r}")
    return found


def gold_of(row: Mapping[str, Any], column: str) -> Gold | None:
    """Return the true answer in a row's column, or several; None where there is none.

    Raises:
        TypeError: the column has something else.
    """
    try:
        return gold_in_cell(row.get(column))
    except TypeError as error:
        raise TypeError(f"answer_field: {error}, in the column {column!r}") from error


def reworded(rows: Sequence[Mapping[str, Any]], second: Tensor, column: str) -> list[dict[str, Any]]:
    """Return the rows, of which those in `second` ``(rows,)`` bool have the wording of `column` as their prompt.

    Raises:
        ValueError: a row has none; remove_unused_columns would have removed the column.
    """
    return [
        {**row, "prompt": second_wording(row["prompt"], row.get(column), column)} if is_second else dict(row)
        for row, is_second in zip(rows, second.tolist(), strict=True)
    ]
