"""The build backend: setuptools', which is also asked for the torch that the extension will be loaded by.

pip builds in an environment of its own unless it is given ``--no-build-isolation``. The extension works only with the torch release
that it was built against, so that environment needs the release that is installed where the package goes; where there is none, pip
installs the newest for both. An sdist needs no torch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

OLDEST_TORCH = (2, 11)


def provide_wheel() -> None:
    """Make ``bdist_wheel`` available: setuptools has it from 70.1 on, and a new environment of Python 3.11 has 65.5 without wheel.

    With ``--no-build-isolation`` pip installs no build requirements, so the package wheel goes to a temporary directory.
    """
    version = importlib.metadata.version("setuptools").split(".")
    if (int(version[0]), int(version[1])) >= (70, 1) or importlib.util.find_spec("wheel") is not None:
        return
    target = tempfile.mkdtemp(prefix="mgrpo-kernels-wheel-")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", target, "wheel"]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit("error: expected setuptools 70.1 or later, or the package wheel; run: pip install wheel")
    sys.path.insert(0, target)


provide_wheel()
from setuptools import build_meta  # noqa: E402 - it looks for bdist_wheel as soon as it is used
from setuptools.build_meta import *  # noqa: E402, F403 - the other hooks


def installed_torch() -> str | None:
    """Return the version of torch where the package will be installed, which the isolated build environment hides."""
    bases = [sys.prefix]
    settings = Path(sys.prefix, "pyvenv.cfg")
    if settings.exists() and re.search(
        r"include-system-site-packages\s*=\s*true", settings.read_text(encoding="utf-8")
    ):
        bases.append(sys.base_prefix)
    paths = [
        sysconfig.get_path(kind, vars={"base": base, "platbase": base})
        for base in bases
        for kind in ("purelib", "platlib")
    ]
    for found in importlib.metadata.distributions(name="torch", path=paths):
        return found.version
    return None


def torch_requirement() -> list[str]:
    """Return what an isolated build needs of torch: the installed release, or any supported one where none is installed.

    A nightly or a build from source has no twin on a package index. It is left out, and the package installs without the extension.
    """
    version = installed_torch()
    if version is None:
        return ["torch>=2.11"]
    public = version.partition("+")[0]
    if re.fullmatch(r"\d+(\.\d+)+", public) is None:
        return []
    release = tuple(int(part) for part in public.split(".")[:2])
    return [f"torch=={public}"] if release >= OLDEST_TORCH else ["torch>=2.11"]  # pip replaces an older one


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), "ninja", *torch_requirement()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), "ninja", *torch_requirement()]
