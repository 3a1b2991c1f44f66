"""The tables of the methods and of their options in README.md and docs/, each from the code. How a page asks for one: see spans.py."""

from __future__ import annotations

import dataclasses

from figures import figure

from mgrpo_kernels.method import METHODS, MOMENTUM_OPTIONS, MethodOptions, help_of


@figure
def methods() -> str:
    """Return the table of methods."""
    lines = [
        f"| `{name}` | {row.text} | {share(row.momentum_share)} | {'on' if row.filters else '-'} | {row.source} |"
        for name, row in METHODS.items()
    ]
    head = "| `--method` | reward of a rollout | momentum model's rollouts | IQR filter | source |"
    return "\n".join([head, "|---|---|---|---|---|", *lines])


@figure
def inferred() -> str:
    """Return the table of what is inferred in the methods, or differs from their publications."""
    lines = [f"| {name} | {row.inferred} |" for name, row in METHODS.items() if row.inferred]
    return "\n".join(["| method | inferred here, or different from the publication |", "|---|---|", *lines])


def share(of_group: float) -> str:
    """Return a share of G rollouts."""
    return f"G / {1 / of_group:g}" if of_group else "-"


@figure
def method_options(prefix: str = "") -> str:
    """Return the table of the method's options under another trainer's names: with verl's prefix those without a momentum model."""
    lines = []
    for each in dataclasses.fields(MethodOptions):
        if not (prefix and each.name in MOMENTUM_OPTIONS):
            default = "none" if each.default is None else f"`{each.default}`"
            lines.append(f"| `{prefix}{each.name}` | {default} | {help_of(each).replace('<', '&lt;')} |")
    return "\n".join(["| option | default | |", "|---|---|---|", *lines])
