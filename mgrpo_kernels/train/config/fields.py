"""An option as a dataclass field, and the base of the configuration's sections."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mgrpo_kernels import checks


def option(
    default: Any,
    text: str,
    *,
    unit: str = "",
    choices: Sequence[str] | None = None,
    bounds: Mapping[str, float] | None = None,
) -> Any:
    """Return a dataclass field with what the command line needs to know about it."""
    return field(default=default, metadata={"help": text, "unit": unit, "choices": choices, "bounds": bounds or {}})


@dataclass(frozen=True)
class Section:
    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            choices, value = each.metadata["choices"], getattr(self, each.name)
            if choices is not None and value is not None:
                checks.check_choice(each.name, value, choices)
        self.check()

    def check(self) -> None:
        """Raise ValueError for a value out of range."""


PAIR = tuple[float, float]
"""The type of an option that is two numbers: ``--vespo-k 2 3`` on the command line, ``vespo_k: [2, 3]`` in YAML."""


def fields_of(section: type[Section]) -> dict[str, tuple[dataclasses.Field[Any], tuple[Any, ...]]]:
    """Return each option of a section with the types it may have."""
    hints = typing.get_type_hints(section)
    return {
        each.name: (
            each,
            typing.get_args(hints[each.name]) if isinstance(hints[each.name], types.UnionType) else (hints[each.name],),
        )
        for each in dataclasses.fields(section)
    }


def typed(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    if float in kinds and isinstance(value, str):  # YAML reads 1e-6, without a point, as text
        try:
            return float(value)
        except ValueError:
            pass
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if PAIR in kinds:
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise ValueError(f"{name}: expected two numbers, got {value!r}")
        return tuple(typed(name, one, (float,)) for one in value)
    if type(value) not in kinds:
        wanted = " or ".join("none" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")
    return value
