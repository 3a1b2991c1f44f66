"""The arguments of a custom op, declared by name, so that no code depends on their order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class Schema:
    """Names and types of a custom op's arguments, and what it returns, in PyTorch's schema language."""

    def __init__(self, arguments: Mapping[str, str], returns: str) -> None:
        self.names = tuple(arguments)
        self.text = f"({', '.join(f'{kind} {name}' for name, kind in arguments.items())}) -> {returns}"

    def pack(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the values in the op's order. Every argument must be given, and nothing else."""
        assert len(values) == len(self.names), f"expected {self.names}, got {tuple(values)}"
        return tuple([values[name] for name in self.names])

    def unpack(self, arguments: Iterable[Any]) -> dict[str, Any]:
        """Return the arguments of a call by name."""
        return dict(zip(self.names, arguments, strict=True))
