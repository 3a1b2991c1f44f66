"""A configuration from layers of options: defaults, presets, YAML files and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mgrpo_kernels.train.config.fields import fields_of, typed
from mgrpo_kernels.train.config.whole import SECTIONS, Config
from mgrpo_kernels.train.errors import UsageError

PRESETS = Path(__file__).parents[1] / "presets"


def build(*layers: Mapping[str, Any]) -> Config:
    """Return the configuration that these layers of option -> value give, later ones over earlier ones, over the defaults.

    Raises:
        UsageError: an unknown option, or a value of the wrong type or out of range.
    """
    values = {name: value for layer in layers for name, value in layer.items()}
    try:
        # A run's own config.yaml has eval_data: null, which says that no evaluation is meant.
        if values.get("eval_every") and values.get("data") is not None and "eval_data" not in values:
            raise ValueError(f"eval_every: expected --eval-data with it, got {values['eval_every']!r} alone")
        parts: dict[str, Any] = {}
        for key, section in SECTIONS.items():
            kinds = {name: kinds for name, (_, kinds) in fields_of(section).items()}
            parts[key] = section(
                **{name: typed(name, values.pop(name), of) for name, of in kinds.items() if name in values}
            )
        if values:
            known = sorted(name for section in SECTIONS.values() for name in fields_of(section))
            raise ValueError(
                f"{next(iter(values))}: expected one of the options {', '.join(known)}, got an unknown one"
            )
        return Config(**parts)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def find_config(name: str) -> Path:
    """Return the file that ``--config`` names: that file where there is one, else the preset of that name.

    Raises:
        UsageError: neither.
    """
    presets = {each.stem: each for each in sorted(PRESETS.glob("*.yaml"))}
    if not Path(name).is_file() and name not in presets:
        raise UsageError(f"config: expected a YAML file that exists, or a preset ({', '.join(presets)}), got {name!r}")
    return Path(name) if Path(name).is_file() else presets[name]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the options in a YAML file.

    Raises:
        UsageError: unreadable, or no mapping of option to value.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"config: expected a readable YAML file, got {path}: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UsageError(f"config: expected lines of 'option: value' in {path}, got {type(values).__name__}")
    return {name.replace("-", "_"): value for name, value in values.items()}
