"""Loads the compiled extension once, and remembers why it could not be."""

from __future__ import annotations

import functools
import importlib


@functools.cache
def missing() -> str | None:
    """Return None once the extension is loaded (its kernels are then in ``torch.ops.mgrpo_native``), else the reason."""
    try:
        importlib.import_module("mgrpo_kernels._C")
    except ImportError as error:
        return f"the compiled extension is absent: {_build_report() or error}"
    return None


def _build_report() -> str | None:
    """Return what setup.py noted when it could not build the extension."""
    try:
        return importlib.import_module("mgrpo_kernels._build_report").REASON
    except ImportError:
        return None
