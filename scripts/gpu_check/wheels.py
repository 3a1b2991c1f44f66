"""Puts the wheels that `make gpu-wheels` collected on the path of a machine without a package index."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import zipfile
from pathlib import Path

# Top-level folders that some wheels install beside their package, and that would hide a folder of this repository.
STRAY = ("tests", "test", "scripts", "benchmarks", "examples", "docs")


def canonical(name: str) -> str:
    """Return a distribution's name as package indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def unpack(folder: Path, to: Path) -> tuple[list[str], list[str]]:
    """Unpack the wheels of `folder` into `to`; return those that were, and those that were not, each with the reason."""
    installed = {canonical(each.metadata["Name"]): each.version for each in importlib.metadata.distributions()}
    unpacked, left_out = [], []
    for wheel in sorted(folder.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        if canonical(name) in installed:
            left_out.append(f"{canonical(name)} {version}: this Python has {installed[canonical(name)]}")
            continue
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(to)
        except (OSError, zipfile.BadZipFile) as error:
            left_out.append(f"{wheel.name}: {error}")
            continue
        unpacked.append(f"{canonical(name)} {version}")
        _take_over(to, to / f"{name}-{version}.data")
    for stray in STRAY:
        shutil.rmtree(to / stray, ignore_errors=True)
    return unpacked, left_out


def _take_over(to: Path, data: Path) -> None:
    """Move what a wheel keeps in its .data folder for the path to where an installer would put it."""
    for part in ("purelib", "platlib"):
        if (data / part).exists():
            shutil.copytree(data / part, to, dirs_exist_ok=True)
    shutil.rmtree(data, ignore_errors=True)
