"""Search the study's runs for a better warning than the guard's: the best rule of two signs on some seeds, counted on the others.

    python examples/collapse/rules.py

A sign is a recorded metric at an evaluation, or its change since the first one, beyond a threshold. A rule is two signs at the same
evaluation, or one. As in warned.py a warning is in time at least 50 steps, here one evaluation, before the first evaluation whose accuracy
is 0.05 below the best before it, and a warning in a run that does not collapse is a false alarm. The rule that warns of most collapsing
runs in time with at most 5% false alarms is chosen on the even seeds and reported on the odd ones, over all files of results. Runs with
true answers or random rewards are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from paired import FILES
from study import AVERAGED, KEPT, read
from summary import row_of
from warned import FALSE_ALARMS, IN_TIME, LEAD, share

from mgrpo_kernels.train.watch.certificate import fall_step

OWN = Path(__file__).parent
COLUMNS = [name for name in (*KEPT, *AVERAGED) if name not in ("step", "label_accuracy")]
"""What a rule may read: `label_accuracy` needs the true answers of the training prompts."""
QUANTILES = (0.01, 0.05, *np.linspace(0.1, 0.9, 9), 0.95, 0.99)
"""Thresholds of a sign, as quantiles of its values at all evaluations of the chosen seeds."""
Array = np.ndarray[Any, Any]


class Evaluations(NamedTuple):
    """The evaluations at which a warning counts, of several runs: those before the fall, or all if the run does not collapse."""

    values: Array  # (number of evaluations, 2 x COLUMNS): metrics and their changes; NaN if unknown
    starts: Array  # first evaluation of each run
    collapsing: Array  # (number of runs,) bool


def of_run(run: dict[str, Any]) -> tuple[Array, bool]:
    """Return the signs' values at each evaluation at which a warning counts, and whether the run collapses."""
    curve = run["curve"]
    columns = np.array(
        [[np.nan if x is None else x for x in curve.get(name, [None] * len(curve["step"]))] for name in COLUMNS]
    ).T
    known = [column[~np.isnan(column)] for column in columns.T]
    changes = columns - np.array([each[0] if len(each) else np.nan for each in known])
    collapses = row_of(run).collapse is not None
    fell = fall_step(list(zip(curve["step"], curve["eval_accuracy"], strict=True)))
    counts = [step <= fell - LEAD if collapses and fell is not None else True for step in curve["step"]]
    return np.hstack([columns, changes])[counts], collapses


def gathered(runs: list[dict[str, Any]]) -> Evaluations:
    values, collapsing = zip(*map(of_run, runs), strict=True)
    return Evaluations(
        np.vstack(values), np.cumsum([0, *(len(each) for each in values[:-1])]), np.array(collapsing, dtype=bool)
    )


class Sign(NamedTuple):
    """A metric, or its change, above (direction 1) or below (-1) a threshold."""

    column: int
    direction: int
    threshold: float

    def holds(self, found: Evaluations) -> Array:
        return self.direction * found.values[:, self.column] > self.direction * self.threshold

    def __str__(self) -> str:
        name = COLUMNS[self.column % len(COLUMNS)]
        return f"{'change of ' * (self.column >= len(COLUMNS))}{name} {'>' if self.direction > 0 else '<'} {self.threshold:.3g}"


def warned(found: Evaluations, holds: Array) -> tuple[Array, Array]:
    """Return how many collapsing runs and how many others have a warning, for each row of `holds`."""
    runs = np.logical_or.reduceat(holds, found.starts, axis=-1)
    return runs[..., found.collapsing].sum(-1), runs[..., ~found.collapsing].sum(-1)


def best_rule(found: Evaluations) -> tuple[Sign, Sign]:
    """Return the rule with the most warnings in time, of those with few enough false alarms; of equals, the one with the fewest."""
    signs = [
        Sign(column, direction, float(threshold))
        for column, values in enumerate(found.values.T)
        for threshold in np.unique(np.nanquantile(values, QUANTILES) if not np.isnan(values).all() else [])
        for direction in (1, -1)
    ]
    holds = np.array([sign.holds(found) for sign in signs])
    most = FALSE_ALARMS * (~found.collapsing).sum()
    best, rule = (-1, 0), (signs[0], signs[0])
    for first, sign in enumerate(signs):
        in_time, alarms = warned(found, holds[first] & holds[first:])
        for second in np.flatnonzero(alarms <= most):
            if (score := (int(in_time[second]), -int(alarms[second]))) > best:
                best, rule = score, (sign, signs[first + second])
    return rule


def table(runs: list[dict[str, Any]]) -> str:
    """Return the rule and the table in Markdown."""
    parts = {
        name: gathered([run for run in runs if run["seed"] % 2 == odd]) for odd, name in enumerate(("even", "odd"))
    }
    rule = best_rule(parts["even"])
    aims = (f"warned at least {LEAD} steps before (aim: {IN_TIME:.0%})", f"false alarms (aim: {FALSE_ALARMS:.0%})")
    lines = [f"| seeds | collapsing runs | {aims[0]} | healthy runs | {aims[1]} |", "|---|---|---|---|---|"]
    for name, found in parts.items():
        in_time, alarms = warned(found, rule[0].holds(found) & rule[1].holds(found))
        healthy = int((~found.collapsing).sum())
        collapsing = len(found.collapsing) - healthy
        lines.append(
            f"| {name} | {collapsing} | {share(int(in_time), collapsing)} | {healthy} | {share(int(alarms), healthy)} |"
        )
    return f"`{' and '.join(dict.fromkeys(map(str, rule)))}`:\n\n" + "\n".join(lines)


def all_runs() -> list[dict[str, Any]]:
    """Return the runs of all files of results, but for those with true answers, random rewards or rollbacks."""
    runs = [run for name in (*FILES, "choice") for run in read(OWN / f"{name}.jsonl")]
    return [
        run
        for run in runs
        if run["options"].get("method") not in ("gold", "random") and run["options"]["guard"] == "off"
    ]


if __name__ == "__main__":
    print(table(all_runs()))
