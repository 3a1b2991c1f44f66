"""Show the docstrings' ``:func:`name` `` as `name` on the API page (an extension of griffe, which reads them)."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Roles(griffe.Extension):
    """Takes the role off."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r":(?:func|meth|class|data):`([^`]+)`", r"`\1`", obj.docstring.value)
