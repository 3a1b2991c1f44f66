"""An option as a dataclass field: its default, help text, unit and range. Its choices are those of its Literal type, or of a table."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable
from typing import Any, NamedTuple

from mgrpo_kernels import checks


def option(
    default: Any,
    text: str,
    *,
    unit: str = "",
    if_none: str = "",
    metavar: str = "",
    group: str = "",
    table: Iterable[str] | None = None,
    **bounds: float,
) -> Any:
    """Return a dataclass field that declares an option.

    Args:
        default: its default value.
        text: what the option is or does, worded so that it can be read alone.
        unit: unit of a number, as it is written after the default.
        if_none: what happens if the option has no value, for an option whose default is None.
        metavar: placeholder of the value on a command line; empty: one that follows from the type.
        group: title of the group that lists it in --help; empty: its section's.
        table: table whose names are the choices, including those that are added to it later; None: the choices are the option's Literal.
        bounds: range of a number, as :func:`mgrpo_kernels.checks.check_number` takes it.
    """
    metadata = {"help": text, "unit": unit, "if_none": if_none, "metavar": metavar, "choices": table, "bounds": bounds}
    return dataclasses.field(default=default, metadata=metadata | {"group": group})


class Declared(NamedTuple):
    """An option of a dataclass."""

    field: dataclasses.Field[Any]
    kinds: tuple[Any, ...]  # the types that a value may have; str for a Literal
    choices: tuple[str, ...] | None  # the values that are allowed; None: any value of its type

    @property
    def if_none(self) -> str:
        """What happens if the option has no value; empty if that is not declared."""
        return str(self.field.metadata.get("if_none", ""))


def fields_of(options: type) -> dict[str, Declared]:
    """Return the options that a dataclass declares, by name."""
    hints = typing.get_type_hints(options)
    return {each.name: _declared(each, hints[each.name]) for each in dataclasses.fields(options)}


def _declared(field: dataclasses.Field[Any], hint: Any) -> Declared:
    hints = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    literals = [each for each in hints if typing.get_origin(each) is typing.Literal]
    choices = field.metadata.get("choices")
    if choices is None and literals:
        choices = typing.get_args(literals[0])
    kinds = tuple(str if each in literals else each for each in hints)
    return Declared(field, kinds, None if choices is None else tuple(choices))


def check_fields(options: Any) -> None:
    """Raise ValueError for an option of a dataclass that is not one of its choices or is out of its range."""
    for name, declared in fields_of(type(options)).items():
        value, bounds = getattr(options, name), declared.field.metadata["bounds"]
        if value is None:
            continue
        if declared.choices is not None:
            checks.check_choice(name, value, declared.choices)
        if bounds:
            for number in value if isinstance(value, tuple) else (value,):
                checks.check_number(name, number, **bounds)


def help_of(field: dataclasses.Field[Any]) -> str:
    """Return an option's help text, with what happens if the option has no value."""
    if_none = field.metadata.get("if_none")
    return f"{field.metadata['help']} (if none: {if_none})" if if_none else str(field.metadata["help"])
