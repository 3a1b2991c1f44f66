"""The base of the configuration's sections, and the check of a value's type."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mgrpo_kernels.method.fields import check_fields


@dataclass(frozen=True)
class Section:
    """A group of options. Its docstring is the title of the group in ``--help``, in config.yaml and in the plan."""

    def __post_init__(self) -> None:
        check_fields(self)
        self.check()

    def check(self) -> None:
        """Raise ValueError for options that do not fit together."""


PAIR = tuple[float, float]
"""The type of an option that is two numbers: ``--vespo-k 2 3`` on the command line, ``vespo_k: [2, 3]`` in YAML."""


def typed(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    """Return an option's value with the type that the option declares.

    Raises:
        ValueError: the value has another type.
    """
    if str in kinds and isinstance(value, dict):  # JSON on the command line, a mapping in YAML
        return json.dumps(value)
    if float in kinds and isinstance(value, str):  # YAML reads 1e-6, without a decimal point, as text
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
        expected = " or ".join("none" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return value
