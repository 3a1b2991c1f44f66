"""The tables of the methods and of their options in README.md and docs/, each from the code. How a page asks for one: see spans.py."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from cells import METHOD_STEPS
from figures import NO_RUN, STUDY, figure, summary
from figures_of_study import second_runs

from mgrpo_kernels.method import METHODS, MOMENTUM_OPTIONS, Method, MethodOptions, help_of


@figure
def methods(*more: str) -> str:
    """Return the table of methods; with the word measured, beside what the collapse study measured."""
    columns = ["`--method`", "reward of a rollout", "momentum model's rollouts", "IQR filter", "source"]
    columns += ["also in"] if more else []
    columns += ["accuracy at step " + str(METHOD_STEPS), "whole run", "time of a step / srt's"] if more else []
    lines = []
    for name, row in METHODS.items():
        cells = [
            f"`{name}`",
            row.text,
            share(row.momentum_share),
            "on" if row.filters else "-",
            row.source,
            *((peers(row), *measured(name)) if more else ()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *lines])


def peers(row: Method) -> str:
    """Return the libraries whose trainers can have the method: verl's has no momentum model and no self-certainty."""
    return "TRL" if row.needs_momentum or row.needs_self_certainty else "TRL, verl"


def measured(method: str) -> tuple[str, str, str]:
    """Return what the study measured of a method: its accuracy after METHOD_STEPS, the whole run, and the relative time of a step."""
    runs, cost = runs_of(method), relative_cost(method)
    if not runs:
        return "not run", "not run", cost
    early = statistics.fmean(summary.row_of(summary.until(run, METHOD_STEPS)).final for run in runs)
    steps = max(run["options"]["steps"] for run in runs)
    rows = [summary.row_of(run) for run in runs if run["options"]["steps"] == steps]
    final, kept = (statistics.fmean(each) for each in ([row.final for row in rows], [row.kept for row in rows]))
    fallen = f"{sum(row.collapse is not None for row in rows)} of {len(rows)} collapsed"
    return f"{early:.2f}", f"{final:.2f}, kept {kept:.2f}; {fallen} in {steps} steps", cost


def runs_of(method: str) -> list[dict[str, Any]]:
    """Return the runs of a method on the study's own start model: of the first edition, or else of the second."""
    cell = {"mgrpo": "mgrpo, N = G/2", "co_rewarding": "momentum labels"}.get(method, method)
    found = [run for run in summary.read(STUDY / "results.jsonl") if run["cell"] == cell]
    return found or list(second_runs("own", method).values())


def relative_cost(method: str) -> str:
    """Return the duration of a method's step as a multiple of that of srt, on the machine of results_cost.jsonl."""
    seconds = {run["cell"]: run["step_seconds"] for run in summary.read(STUDY / "results_cost.jsonl")}
    cells = [f"cost: {name}" for name in (method, "srt")]
    return f"{seconds[cells[0]] / seconds[cells[1]]:.2f}" if seconds.keys() >= set(cells) else NO_RUN


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
