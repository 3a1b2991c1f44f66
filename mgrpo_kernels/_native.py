"""Loads the compiled extension once, and keeps the reason if it cannot be loaded."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from pathlib import Path

import torch

REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall PATH/TO/mgrpo_kernels"
"""What builds the extension for the torch that is installed."""


@functools.cache
def missing() -> str | None:
    """Return None once the extension is loaded (its kernels are then in ``torch.ops.mgrpo_native``), else the reason."""
    spec = importlib.util.find_spec("mgrpo_kernels._C")
    if spec is None or spec.origin is None:
        report = _build_report() or f"mgrpo_kernels has no extension for this Python; build it with: {REBUILD}"
        return f"the compiled extension is absent: {report}"
    reason = wrong_torch(Path(spec.origin), torch.__version__)
    if reason is not None:
        return f"the compiled extension is refused: {reason}"
    try:
        importlib.import_module("mgrpo_kernels._C")
    except ImportError as error:
        return f"the compiled extension cannot be loaded: {error}; build it again with: {REBUILD}"
    return None


def wrong_torch(extension: Path, version: str) -> str | None:
    """Return None if an extension was built against this release of torch, else the reason.

    torch promises no binary compatibility between minor releases: loading such a file can end the process. It is therefore read, not
    loaded, for the version that csrc/library.cpp compiles into its text ``build_info``.
    """
    found = re.search(rb"compiler [^\0]*, torch ([0-9][^\0,]*), flags ", extension.read_bytes())
    built = found.group(1).decode() if found else "an unknown version"
    if built.split(".")[:2] == version.split(".")[:2]:
        return None
    return f"{extension.name} was built against torch {built}, and torch {version} is installed; build it again with: {REBUILD}"


def _build_report() -> str | None:
    """Return the reason that setup.py recorded if it did not build the extension."""
    try:
        reason: str | None = importlib.import_module("mgrpo_kernels._build_report").REASON
    except ImportError:
        return None
    return reason
