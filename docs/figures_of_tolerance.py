"""The figures of the study's runs with gradients to a tolerance, beside exact ones. How a page asks for one: see spans.py."""

from __future__ import annotations

import statistics
from typing import Any

import paired
from figures import NO_RUN, REAL_MODEL, STUDY, figure, summary

MEASURES = ("accuracy", "entropy", "vote_share")


def end(run: dict[str, Any], measure: str) -> float:
    """Return a measure at the end of a run: the final accuracy as in the tables, or a column's last value."""
    return summary.row_of(run).final if measure == "accuracy" else float(run["curve"][measure][-1])


def pairs(cell: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the exact run and the one with a tolerance of each start model and seed that has both."""
    runs = {(run["cell"], run["seed"]): run for run in summary.read(STUDY / "results_second.jsonl")}
    name, _, steps = cell.rpartition(", ")
    return [
        (run, runs[rough, seed])
        for (found, seed), run in sorted(runs.items())
        for base in ("", "lazy: ")
        for rough in [f"{base}{name}, tolerance, {steps}"]
        if found == base + cell and (rough, seed) in runs
    ]


@figure
def tolerance_bands(*cells: str) -> str:
    """Return how the runs of each cell end exactly and with a tolerance, and the differences of pairs with equal start model and seed."""
    lines = [
        "| cell | pairs | at the end | exact: mean (least - most) | tolerance 2^-8: mean (least - most) | difference | within |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for cell in cells:
        found = pairs(cell)
        for measure in MEASURES if found else ():
            exact, rough = ([end(pair[which], measure) for pair in found] for which in (0, 1))
            shown = [f"{statistics.fmean(each):.3f} ({min(each):.3f} - {max(each):.3f})" for each in (exact, rough)]
            change = paired.Pair([two - one for one, two in zip(exact, rough, strict=True)])
            error = "" if change.error is None else f" ± {change.error:.3f}"
            within = "yes" if min(exact) <= statistics.fmean(rough) <= max(exact) else "no"
            cells_of_row = [
                cell,
                str(len(found)),
                measure.replace("_", " "),
                *shown,
                f"{change.mean:+.3f}{error}",
                within,
            ]
            lines.append(f"| {' | '.join(cells_of_row)} |")
    return "\n".join(lines) if len(lines) > 2 else NO_RUN


@figure
def left_out() -> str:
    """Return what the tolerance leaves out with the study's start models, the least and the most of them."""
    found = summary.read(STUDY / "left_out.jsonl")
    if not found:
        return NO_RUN
    parts = []
    for key, what, digits in (
        ("entries", "of the entries of the gradient", 0),
        ("gradient", "of its absolute values", 2),
        ("tokens", "of the tokens lack at least one entry", 0),
    ):
        values = [each[key] for each in found]
        parts.append(f"{min(values):.{digits}%} to {max(values):.{digits}%} {what}")
    return f"{parts[0]} with {parts[1]}; {parts[2]}"


@figure
def real_model_pair(one: str, other: str) -> str:
    """Return how the real model's runs of two cells end on the seeds that both have."""
    runs = {(run["cell"], run["seed"]): run for run in summary.read(REAL_MODEL / "results.jsonl")}
    seeds = sorted(seed for cell, seed in runs if cell == one and (other, seed) in runs)
    if not seeds:
        return NO_RUN
    shown = []
    for cell in (one, other):
        values = [runs[cell, seed]["curve"]["eval_accuracy"][-1] for seed in seeds]
        shown.append(", ".join(f"{value:.2f}" for value in values))
    return f"{shown[0]} and {shown[1]} on seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
