"""What griffe, which reads the docstrings for the API page, is to show otherwise than it stands in the source."""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

import mgrpo_kernels


class Roles(griffe.Extension):
    """Show :func:`name` as `name`, and the options of a policy loss, which the functions' docstrings get when imported."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one object's docstring."""
        if obj.docstring is None:
            return
        function = getattr(mgrpo_kernels, obj.name, None)
        if isinstance(obj, griffe.Function) and function is not None and "{options}" in obj.docstring.value:
            obj.docstring.value = inspect.getdoc(function) or ""
            obj.parameters = griffe.Parameters(*map(_parameter, inspect.signature(function).parameters.values()))
        obj.docstring.value = re.sub(r":(?:func|meth|class|data):`([^`]+)`", r"`\1`", obj.docstring.value)


def _parameter(parameter: inspect.Parameter) -> griffe.Parameter:
    return griffe.Parameter(
        parameter.name,
        annotation=str(parameter.annotation),
        kind=griffe.ParameterKind[parameter.kind.name.lower()],
        default=None if parameter.default is inspect.Parameter.empty else repr(parameter.default),
    )
