"""The optional packages of the commands, and the extra of pyproject.toml that installs each."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mgrpo_kernels.train.config import Config

EXTRAS = {
    "train": ("transformers", "safetensors", "yaml", "math_verify", "matplotlib", "rich"),
    "data": ("datasets", "pyarrow"),
    "vllm": ("vllm", "httpx"),
    "trl": ("trl",),
    "lora": ("peft",),
    "loggers": ("tensorboard", "wandb", "trackio"),
    "flash-attn": ("flash_attn",),
}
"""Packages of each extra, under their import names."""
CHECKOUT = Path(__file__).parents[2]
"""Directory of the checkout, if the package runs from one."""
NO_TRAINING = ("mgrpo_kernels.train.serve",)
"""Commands of this package, for ``python -m``, that do not import packages of the extra train."""


def installed(package: str) -> bool:
    """Return whether the package is installed, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a module that raises, or one without a specification, has its name
        return False


def how_to_install(package: str) -> str:
    """Return the command that installs the package through an extra of this library."""
    extra = next(extra for extra, packages in EXTRAS.items() if package in packages)
    command = f"pip install 'mgrpo_kernels[{extra}]'"
    if (CHECKOUT / "pyproject.toml").exists():  # no package index has what is in a checkout
        command = f"pip install --no-build-isolation --editable {shlex.quote(f'{CHECKOUT}[{extra}]')}"
    # The package on PyPI requires a GPU; make vllm installs the CPU build if there is none.
    return f"{command}, or make vllm in a checkout" if package == "vllm" else command


def check_packages(config: Config, *, training: bool = True) -> None:
    """Check that the optional packages that the options require are installed.

    Raises:
        UsageError: a package is missing; the message names the option and the command that installs the package.
    """
    # Imported here, because the import of these modules may need a package that is missing.
    from mgrpo_kernels.train.errors import UsageError
    from mgrpo_kernels.train.rollout.engines import ENGINES

    needed = {"report": "matplotlib"} if training else {}
    needed |= {name: name for name in EXTRAS["loggers"] if getattr(config.run, name)}
    if config.lora.lora_rank is not None:
        needed["lora_rank"] = "peft"
    if (package := ENGINES[config.rollout.engine].package) is not None:
        needed["engine"] = package
    if config.vllm.server_urls:
        needed["vllm_servers"] = "httpx"
    for option, package in needed.items():
        if not installed(package):
            raise UsageError(f"{option}: expected the package {package}, got none: {how_to_install(package)}")


def check_command() -> None:
    """End a command of this package with one line if a package of the extra train is missing.

    The commands import these packages at their top, so this check runs earlier, while the package itself is imported and ``sys.argv[0]`` is
    "-m". It does nothing if Python code imports the package.
    """
    if sys.argv[:1] != ["-m"]:
        return
    names = (name.removeprefix("-m") for name in sys.orig_argv)
    module = next((name for name in names if name.startswith(__package__)), __package__)
    missing = [] if module in NO_TRAINING else [package for package in EXTRAS["train"] if not installed(package)]
    if missing:
        error = f"python -m {module}: expected {', '.join(missing)}, got none installed: {how_to_install(missing[0])}"
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2)
