"""Options on a command line: what the trainer's and the evaluation's parsers share."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgrpo_kernels.train.config import PAIR, PRESETS, SECTIONS, fields_of, find_config, read_yaml
from mgrpo_kernels.train.errors import UsageError

LONGEST_CHOICES = 40
"""Choices that take more characters than this are named in the help text, not in the flag's line."""

OPTIONS = {name: found for section in SECTIONS.values() for name, found in fields_of(section).items()}
"""Every option of the trainer: name -> (dataclass field, types that it may have)."""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Flags in a narrow column, which leaves the help texts room in 80 columns."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=26, **options)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        # the description is one paragraph, the epilog has its lines
        return super()._fill_text(text if "\n" in text else textwrap.fill(text, width), width, indent)


def make_parser(program: str, usage: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser without options. One that is not given will be absent from its result."""
    return argparse.ArgumentParser(
        prog=f"python -m {program}",
        usage=usage,
        description=description,
        epilog=epilog,
        formatter_class=Formatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )


def add_config(group: Any) -> None:
    """Add ``--config``."""
    presets = ", ".join(sorted(each.stem for each in PRESETS.glob("*.yaml")))
    group.add_argument(
        "--config", metavar="FILE", help=f"YAML file of options, such as a run's config.yaml, or a preset: {presets}"
    )


def add_option(group: Any, name: str) -> None:
    """Add an option of the trainer's configuration."""
    field, kinds = OPTIONS[name]
    flag, kind = "--" + name.replace("_", "-"), next(kind for kind in kinds if kind is not type(None))
    text = help_of(field).replace("%", "%%")
    if kind == PAIR:
        group.add_argument(flag, type=float, nargs=2, metavar=("X", "Y"), help=text)
    elif kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    else:
        choices = field.metadata["choices"]
        group.add_argument(flag, type=kind, choices=choices, metavar=metavar_of(field, kind), help=text)


def help_of(field: dataclasses.Field[Any]) -> str:
    """Return what an option means, its long list of choices, and its default with the unit."""
    choices, unit, default = field.metadata["choices"], field.metadata["unit"], field.default
    if default is None:
        default = "none"
    elif isinstance(default, bool):
        default = "on" if default else "off"
    elif isinstance(default, tuple):
        default = " ".join(map(str, default))
    elif isinstance(default, str) and "\n" in default:
        default = repr(default)
    named = ""
    if choices and metavar_of(field, str) and field.name != "method":  # the methods have a list of their own
        named = f"; one of {', '.join(choices)}"
    return f"{field.metadata['help']}{named} (default: {default}{f', {unit}' if unit else ''})"


def metavar_of(field: dataclasses.Field[Any], kind: type) -> str | None:
    """Return what stands for an option's value, None where its choices do."""
    choices = field.metadata["choices"]
    if choices:
        return "NAME" if len(",".join(choices)) > LONGEST_CHOICES else None
    return {int: "N", float: "X", str: "TEXT"}[kind]


def read_config(name: str | None) -> Mapping[str, Any]:
    """Return the options in the file or preset that ``--config`` names; none for None.

    Raises:
        UsageError: neither a file nor a preset, or a file that cannot be read.
    """
    return {} if name is None else read_yaml(find_config(name))


def output_directory(given: str | None, default: str) -> Path:
    """Return the directory that ``--output`` names, or the default under runs/."""
    return Path("runs") / default if given is None else Path(given)


def require(values: Mapping[str, Any], *names: str) -> None:
    """Raise UsageError for an option of these that has no value."""
    for name in names:
        if values.get(name) is None:
            raise UsageError(f"{name}: expected a value, got none")
