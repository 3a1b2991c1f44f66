"""The parts of a command line that training and evaluation share: the parser, its options, and how a default is written."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mgrpo_kernels.method.fields import Declared
from mgrpo_kernels.train.config import PAIR, SECTIONS, fields_of, find_config, preset_files, read_yaml
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.parser import Parser, flag_of
from mgrpo_kernels.train.text import print_line

LONGEST_CHOICES = 40
"""Choices that take more characters than this are listed in the help text instead of behind the option's name."""
WIDTH = 80
"""Columns that a help text takes at most."""

OPTIONS = {name: found for section in SECTIONS.values() for name, found in fields_of(section).items()}
"""Every option of the trainer, by name."""
MOST_USED = "most used options"
"""Title of the first group of options."""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Writes option names in a narrow column, which leaves the help texts enough room in 80 columns."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=26, **options)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        # The description is one paragraph; the epilog comes with its line breaks.
        return super()._fill_text(text if "\n" in text else textwrap.fill(text, width), width, indent)


class ShortHelp(argparse.Action):
    """``-h``: prints the first group of options only, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        formatter = Formatter(parser.prog)
        group = next(each for each in parser._action_groups if each.title == MOST_USED)
        formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
        formatter.add_text(parser.description)
        formatter.start_section(group.title)
        formatter.add_arguments(group._group_actions)
        formatter.end_section()
        formatter.add_text(f"{parser.prog} --help describes every option, and has examples.")
        print_line(formatter.format_help().rstrip("\n"))
        parser.exit()


def make_parser(program: str, usage: str, description: str, epilog: str | None = None) -> Parser:
    """Return a parser without options. An option that is not on the command line will be absent from its result."""
    return Parser(
        prog=f"python -m {program}",
        usage=usage,
        description=description,
        epilog=epilog,
        formatter_class=Formatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )


def add_help(parser: argparse.ArgumentParser) -> None:
    """Add ``-h``, the most used options, and ``--help``, all options."""
    group = parser.add_argument_group("help")
    group.add_argument("-h", action=ShortHelp, nargs=0, help="show the most used options and exit")
    group.add_argument("--help", action="help", help="show all options and exit")


def add_config(group: Any) -> None:
    """Add ``--config``."""
    presets = ", ".join(each.stem for each in preset_files())
    group.add_argument(
        "--config",
        metavar="FILE_OR_PRESET",
        help=f"YAML file of options, such as the config.yaml of an earlier run, or a preset: {presets} (default: none)",
    )


def add_options(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Add options of the trainer's configuration, in a group for each section, or in the groups that they name."""
    chosen = set(names)
    for section in SECTIONS.values():
        groups: dict[str, list[str]] = {}
        for name, option in fields_of(section).items():
            if name in chosen:
                groups.setdefault(option.field.metadata.get("group") or title_of(section), []).append(name)
        for title, own in groups.items():
            group = parser.add_argument_group(title)
            for name in own:
                add_option(group, name)


def title_of(section: type) -> str:
    """Return the title of a section of the configuration."""
    return (section.__doc__ or "").rstrip(".")


def add_option(group: Any, name: str, *, required: bool = False) -> None:
    """Add an option of the trainer's configuration; for a `required` one, the help text has no default."""
    option = OPTIONS[name]
    flag, kind = flag_of(name), next(each for each in option.kinds if each is not type(None))
    text = f"{option.field.metadata['help']} (required, unless --config has it)" if required else help_of(option)
    text = text.replace("%", "%%")
    if kind == PAIR:
        group.add_argument(flag, type=float, nargs=2, metavar=("X", "Y"), help=text)
    elif kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    else:
        group.add_argument(flag, type=kind, choices=option.choices, metavar=metavar_of(option, kind), help=text)


def help_of(option: Declared) -> str:
    """Return what an option means, its choices if they are many, and its default with the unit."""
    named = f"; one of {', '.join(option.choices)}" if option.choices and lists_choices(option) else ""
    return f"{option.field.metadata['help']}{named} (default: {default_of(option)})"


def default_of(option: Declared) -> str:
    """Return an option's default as it is shown: what happens without a value, or the value with its unit."""
    default, unit = option.field.default, option.field.metadata["unit"]
    if default is None:
        return option.if_none or "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    if isinstance(default, str) and "\n" in default:
        return repr(default)
    if default == 1:
        unit = unit.removesuffix("s")
    return f"{default} {unit}".rstrip()


def lists_choices(option: Declared) -> bool:
    """Return whether an option's choices are listed in its help text, because they are too long to follow its name."""
    return len(",".join(option.choices or ())) > LONGEST_CHOICES


def metavar_of(option: Declared, kind: type) -> str | None:
    """Return the placeholder of an option's value; None if the choices take its place."""
    if option.choices:
        return "NAME" if lists_choices(option) else None
    return option.field.metadata.get("metavar") or {int: "N", float: "X", str: "TEXT"}[kind]


def table(rows: Mapping[str, str]) -> str:
    """Return names and descriptions as indented lines; a description that is too long continues below its beginning."""
    width = max(map(len, rows))
    hanging = " " * (width + 4)
    return "\n".join(
        textwrap.fill(text, WIDTH, initial_indent=f"  {name:<{width}}  ", subsequent_indent=hanging)
        for name, text in rows.items()
    )


def read_config(name: str | None) -> Mapping[str, Any]:
    """Return the options in the file or preset that ``--config`` names; no options for None.

    Raises:
        UsageError: there is no such file or preset, or it cannot be read.
    """
    return {} if name is None else read_yaml(find_config(name))


def output_directory(given: str | None, default: str) -> Path:
    """Return the directory that ``--output`` names; without it, the default below runs/."""
    return Path("runs") / default if given is None else Path(given)


def require(values: Mapping[str, Any], *names: str) -> None:
    """Raise UsageError if one of these options has no value."""
    for name in names:
        if values.get(name) is None:
            raise UsageError(f"{name}: expected a value, got none: add {flag_of(name)}")
