"""Builds a configuration from layers of options: defaults, presets, YAML files and the command line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mgrpo_kernels.method.fields import fields_of
from mgrpo_kernels.train.config.fields import typed
from mgrpo_kernels.train.config.whole import SECTIONS, Config
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.parser import did_you_mean, suggestion

PRESETS = Path(__file__).parents[1] / "presets"


def build(*layers: Mapping[str, Any]) -> Config:
    """Return the configuration made from layers of option -> value. Later layers override earlier ones, and all override the defaults.

    Raises:
        UsageError: an option is unknown, or a value has the wrong type or is out of range.
    """
    values = {name: value for layer in layers for name, value in layer.items()}
    try:
        # The config.yaml of a run without evaluation has eval_data: null beside the default eval_every.
        if values.get("eval_every") and values.get("data") is not None and "eval_data" not in values:
            raise ValueError(f"eval_every: expected --eval-data with it, got {values['eval_every']!r} alone")
        parts: dict[str, Any] = {}
        for key, section in SECTIONS.items():
            given = {name: each.kinds for name, each in fields_of(section).items() if name in values}
            parts[key] = section(**{name: typed(name, values.pop(name), kinds) for name, kinds in given.items()})
        if values:
            known, name = [each for section in SECTIONS.values() for each in fields_of(section)], next(iter(values))
            meant = did_you_mean(suggestion(name, known))
            raise ValueError(f"{name}: expected one of the options that --help lists, got an unknown one{meant}")
        return Config(**parts)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def find_config(name: str) -> Path:
    """Return the file that ``--config`` names: the file of that name if it exists, else the preset of that name.

    Raises:
        UsageError: there is neither.
    """
    presets = {each.stem: each for each in preset_files()}
    if not Path(name).is_file() and name not in presets:
        close = difflib.get_close_matches(name, presets, n=1)
        raise UsageError(
            f"config: expected a YAML file that exists, or a preset ({', '.join(presets)}), got {name!r}"
            f"{did_you_mean(close[0] if close else None)}"
        )
    return Path(name) if Path(name).is_file() else presets[name]


def preset_files() -> list[Path]:
    """Return the files of the presets, sorted by name."""
    return sorted(PRESETS.glob("*.yaml"))


def preset_descriptions() -> dict[str, str]:
    """Return what each preset is for: the first line of its file, which is a comment."""
    return {
        each.stem: each.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for each in preset_files()
    }


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the options in a YAML file.

    Raises:
        UsageError: the file cannot be read, or is not a mapping of options to values.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"config: expected a readable YAML file, got {path}: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UsageError(f"config: expected lines of 'option: value' in {path}, got {type(values).__name__}")
    return {name.replace("-", "_"): value for name, value in values.items()}
