"""The figures of the collapse study, from the committed results in examples/collapse/. How a page asks for one: see spans.py."""

from __future__ import annotations

import re
import statistics
from itertools import pairwise
from typing import Any

import numpy as np
import paired
import rules
import warned
from cells import DOSES, LAZY_SHARE
from figures import NO_RUN, STUDY, figure, summary

CERTIFIED = ("results_second", "choice")
"""Results whose runs have a certificate."""


def cells_of(files: str, until: str = "") -> dict[str, list[dict[str, Any]]]:
    """Return the runs of files such as results,results_zen3, by cell."""
    found = [each for name in files.split(",") for each in summary.read(STUDY / f"{name}.jsonl")]
    return summary.by_cell([summary.until(each, int(until)) for each in found] if until else found)


@figure
def collapse(files: str, *cells: str) -> str:
    """Return the table of some cells of a file, or of all."""
    every = cells_of(files)
    return summary.table({cell: every[cell] for cell in cells or every})


@figure
def by_seed(files: str, key: str, until: str, *cells: str) -> str:
    """Return a column's last value by seed, as it was after `until` steps, or at the end."""
    every = cells_of(files, "" if until == "end" else until)
    return summary.by_seed({cell: every[cell] for cell in cells or every}, key)


@figure
def kept(files: str, cell: str, what: str = "seeds") -> str:
    """Return final accuracy over best: of each seed, or their mean."""
    rows = [summary.row_of(each).kept for each in cells_of(files)[cell]]
    return f"{statistics.fmean(rows):.3f}" if what == "mean" else ", ".join(f"{each:.3f}" for each in rows)


@figure
def final(files: str, cell: str, number: str) -> str:
    """Return the final accuracy of a seed's run, a mean over the last evaluations as in the tables."""
    (found,) = [each for each in cells_of(files)[cell] if each["seed"] == int(number)]
    return f"{summary.row_of(found).final:.2f}"


@figure
def seed(files: str, cell: str, number: str, key: str = "eval_accuracy", until: str = "") -> str:
    """Return a column's last value in the run of a seed."""
    (found,) = [each for each in cells_of(files, until)[cell] if each["seed"] == int(number)]
    return f"{found['curve'][key][-1]:.2f}"


@figure
def mean(files: str, cell: str, key: str = "eval_accuracy", until: str = "") -> str:
    """Return a column's last value, or the final accuracy as in the tables, the mean over seeds."""
    found = cells_of(files, until)[cell]
    return f"{statistics.fmean(summary.row_of(each).final if key == 'final' else each['curve'][key][-1] for each in found):.2f}"


@figure
def pruned(files: str, cell: str) -> str:
    """Return the share of all rollouts that a cell's runs pruned."""
    shares = [each for one in cells_of(files)[cell] for each in one["curve"]["pruned_fraction"] if each is not None]
    return f"{statistics.fmean(shares):.1%}"


@figure
def collapsed_at(files: str, cell: str) -> str:
    """Return the first and the last step at which a run of the cell collapsed."""
    steps = [at for each in cells_of(files)[cell] if (at := summary.row_of(each).collapse) is not None]
    return f"{min(steps)} to {max(steps)} steps"


@figure
def filter_pairs(until: str = "end") -> str:
    """Return what the IQR filter changed, in pairs of runs, at the end or after `until` steps."""
    return paired.table(list(paired.OF_FILTER), paired.results(None if until == "end" else int(until)))


@figure
def warned_in_time() -> str:
    """Return how early the guard warned in the runs that have a certificate."""
    runs = warned.with_certificate([STUDY / f"{name}.jsonl" for name in CERTIFIED])
    return warned.table(runs) if runs else NO_RUN


@figure
def aim_missed() -> str:
    """Return by how much the guard misses its aim over all runs with a certificate, and what the false alarms are."""
    runs = warned.with_certificate([STUDY / f"{name}.jsonl" for name in CERTIFIED])
    found = warned.count(runs, label_free=False)
    if not found.collapsing or not found.healthy:
        return NO_RUN
    late = warned.IN_TIME - found.in_time / found.collapsing
    alarms = found.false_alarms / found.healthy - warned.FALSE_ALARMS
    fell = sum(
        bool(run["certificate"]["warnings"]) and run["certificate"]["fall_step"] is not None
        for run in runs
        if summary.row_of(run).collapse is None
    )
    return (
        f"{100 * late:.0f} points too few collapsing runs are warned of in time, and the share of false alarms is {100 * alarms:.0f} "
        f"points too high. {fell} of the {found.false_alarms} false alarms are in runs that did lose 5 points for a time."
    )


@figure
def quartile_pairs() -> str:
    """Return what the filter changed with each comparison of the entropies, in pairs of runs."""
    return paired.table(list(paired.OF_QUARTILES), paired.results())


@figure
def best_rule() -> str:
    """Return the best rule of two signs on the even seeds, and what it warns of on the odd ones."""
    return rules.table(rules.all_runs())


@figure
def falls_at_once() -> str:
    """Return how many collapsing runs fall at their first evaluation."""
    found = rules.gathered(rules.all_runs())
    first = int((np.diff([*found.starts, len(found.values)]) == 1)[found.collapsing].sum())
    return rules.share(first, int(found.collapsing.sum()))


@figure
def doses() -> str:
    """Return OM-GRPO's last and best accuracy by the weight of the answer's tokens, by start model and seed."""
    runs = {(run["cell"], run["seed"]): run for run in summary.read(STUDY / "results_second.jsonl")}
    places = [
        (base, seed)
        for base in ("", "lazy: ")
        for seed in sorted({seed for cell, seed in runs if cell.startswith(f"{base}om_grpo, answer")})
    ]
    names = (f"{base or 'own: '}seed {seed}" for base, seed in places)
    lines = [f"| answer weight | {' | '.join(names)} |"]
    lines.append("|---" * (len(places) + 1) + "|")
    for dose in DOSES:
        found = [runs.get((f"{base}om_grpo, answer weight {dose}, 300 steps", seed)) for base, seed in places]
        ends = (
            f"{run['curve']['eval_accuracy'][-1]:.2f}, {summary.row_of(run).best:.2f}" if run else "" for run in found
        )
        lines.append(f"| {dose:g} | {' | '.join(ends)} |")
    return "\n".join(lines)


DIPS_AFTER = 1000
"""Steps after which an evaluation below :data:`GOAL` of the best so far counts as a dip: no run learns much later."""


@figure
def dips(files: str, *cells: str) -> str:
    """Return the share of low evaluations: of those after :data:`DIPS_AFTER` steps, below :data:`GOAL` of the best so far."""
    low = [
        value < GOAL * max(values[: at + 1])
        for cell in cells
        for run in cells_of(files)[cell]
        for values in [run["curve"]["eval_accuracy"]]
        for at, (step, value) in enumerate(zip(run["curve"]["step"], values, strict=True))
        if step > DIPS_AFTER
    ]
    return f"{statistics.fmean(low):.0%}"


BANDS = (0.0, 0.45, 0.55, 0.65, 1.0)
"""Accuracy of the first majority, of which each pair of neighbours is a row."""


def plain_name(cell: str) -> str:
    """Return a cell's name without the start model and the number of steps, the same in both editions."""
    name = re.sub(r"^(choice: |choice, lazy: |lazy: )|, \d+ steps$", "", cell)
    return {"mgrpo, N = G/2": "half", "half, excess": "excess"}.get(name, name)


@figure
def fate_by_first_majority(until: str, *cells: str) -> str:
    """Return how many runs of each cell end below their start after `until` steps, by the accuracy of the first majority."""
    longest: dict[tuple[str, str, int, str], dict[str, Any]] = {}
    for file in (*paired.FILES, "choice"):
        for run in sorted(summary.read(STUDY / f"{file}.jsonl"), key=lambda run: run["options"]["steps"]):
            longest[file, run["options"].get("base", "own"), run["seed"], plain_name(run["cell"])] = run
    lines = [f"| first majority | {' | '.join(cells)} |", "|---" * (len(cells) + 1) + "|"]
    for low, high in pairwise(BANDS):
        counts = []
        for cell in cells:
            of_cell = [summary.until(run, int(until)) for (*_, name), run in longest.items() if name == cell]
            rows = [summary.row_of(run) for run in of_cell if low <= run["curve"]["eval_maj_at_k"][0] < high]
            counts.append(f"{sum(row.final < row.start for row in rows)} of {len(rows)}" if rows else "-")
        lines.append(f"| {low:.2f} - {high:.2f} | {' | '.join(counts)} |")
    return "\n".join(lines)


GOAL = 0.97
"""Share of its best accuracy that a default should keep, over ten times the steps that srt lasts."""


def second_runs(base: str, name: str) -> dict[int, dict[str, Any]]:
    """Return the longest run of each seed in the second edition, of what its cells name so before the number of steps."""
    prefix = ("" if base == "own" else "lazy: ") + name
    runs = [run for run in summary.read(STUDY / "results_second.jsonl") if run["cell"].rpartition(", ")[0] == prefix]
    return {run["seed"]: run for run in sorted(runs, key=lambda run: run["options"]["steps"])}


def long_rows(steps: str, cells: tuple[str, ...]) -> dict[tuple[str, int], dict[str, dict[str, Any]]]:
    """Return the runs of the second edition with so many steps, of these cells, by start model and seed."""
    found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for run in summary.read(STUDY / "results_second.jsonl"):
        base = "lazy" if run["cell"].startswith("lazy: ") else "own"
        for cell in cells:
            if run["cell"].removeprefix("lazy: ") == f"{cell}, {steps} steps":
                found.setdefault((base, run["seed"]), {})[cell] = run
    return dict(sorted(found.items(), key=lambda each: (each[0][0] == "lazy", each[0][1])))


@figure
def long_runs(steps: str, *cells: str) -> str:
    """Return final accuracy and share kept by seed, with means over the seeds that all cells have."""
    found = long_rows(steps, cells)
    if not found:
        return NO_RUN
    columns = ("start model", "seed", "first majority", "srt collapsed at", *cells)
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for (base, seed), runs in found.items():
        majority = next(iter(runs.values()))["curve"]["eval_maj_at_k"][0]
        srt = second_runs(base, "srt").get(seed)
        at = "-" if srt is None or (step := summary.row_of(srt).collapse) is None else str(step)
        rows = [summary.row_of(runs[cell]) if cell in runs else None for cell in cells]
        ends = [f"{row.final:.3f}, {row.kept:.3f}" if row else "" for row in rows]
        lines.append(f"| {' | '.join([base, str(seed), f'{majority:.2f}', at, *ends])} |")
    shared = [[summary.row_of(runs[cell]) for cell in cells] for runs in found.values() if runs.keys() >= set(cells)]
    if shared:
        means = (
            f"{statistics.fmean(row.final for row in of_cell):.3f}, {statistics.fmean(row.kept for row in of_cell):.3f}"
            for of_cell in zip(*shared, strict=True)
        )
        lines.append(f"| mean of {len(shared)} seeds | | | | {' | '.join(means)} |")
    return "\n".join(lines)


@figure
def long_verdict(steps: str, cell: str, *others: str) -> str:
    """Return on how many seeds each cell reaches the goal where the first majority is right, and by how much the first ends higher."""
    right = [
        runs for runs in long_rows(steps, (cell, *others)).values() if majority_is_right(next(iter(runs.values())))
    ]
    words = []
    for name in (cell, *others):
        kept = [summary.row_of(runs[name]).kept >= GOAL for runs in right if name in runs]
        words.append(f"`{name}` keeps {GOAL} of its best on {sum(kept)} of {len(kept)} seeds")
    for other in others:
        both = [
            [summary.row_of(runs[name]).final for name in (cell, other)]
            for runs in right
            if {cell, other} <= runs.keys()
        ]
        if both:
            found = paired.Pair([one - two for one, two in both])
            error = "" if found.error is None else f", with a standard error of {found.error:.3f}"
            words.append(
                f"`{cell}` minus `{other}` is {found.mean:+.3f} in the mean of {len(both)} seed{'s' * (len(both) > 1)}{error}"
            )
    return ". ".join(words) + "."


def majority_is_right(run: dict[str, Any]) -> bool:
    """Return whether the first majority is right on more than half of the held-out prompts."""
    return bool(run["curve"]["eval_maj_at_k"][0] > 0.5)


def goal_rows(one: str, other: str) -> list[dict[str, Any]]:
    """Return for each start model and seed of the second edition: the first majority, when srt collapsed, and two rows."""
    found = []
    for base in ("own", "lazy"):
        runs = {cell: second_runs(base, cell) for cell in ("srt", one, other)}
        for seed in sorted(runs[one].keys() & runs[other].keys()):
            mine, theirs = (runs[cell][seed] for cell in (one, other))
            steps = min(run["curve"]["step"][-1] for run in (mine, theirs))
            majority = mine["curve"]["eval_maj_at_k"][0]
            lasted = summary.row_of(runs["srt"][seed]).collapse if seed in runs["srt"] else None
            rows = [summary.row_of(summary.until(run, steps)) for run in (mine, theirs)]
            found.append(
                {"base": base, "seed": seed, "majority": majority, "srt": lasted, "steps": steps, "rows": rows}
            )
    return found


@figure
def goal(one: str, other: str) -> str:
    """Return the table of two cells beside srt, by start model and seed."""
    columns = ("start model", "seed", "first majority", "srt collapsed at", "steps")
    rows: list[tuple[object, ...]] = [(*columns, f"{one}: final, kept", f"{other}: final, kept")]
    rows.append(("---",) * len(rows[0]))
    for each in goal_rows(one, other):
        at = "-" if each["srt"] is None else each["srt"]
        ends = (f"{row.final:.2f}, {row.kept:.3f}" for row in each["rows"])
        rows.append((each["base"], each["seed"], f"{each['majority']:.2f}", at, each["steps"], *ends))
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows) if len(rows) > 2 else NO_RUN


@figure
def goal_verdict(one: str, other: str) -> str:
    """Return the means of two cells, and on how many seeds each reached the goal where the first majority is right more often than not."""
    every = goal_rows(one, other)
    right = [each for each in every if each["majority"] > 0.5]
    if not right:
        return NO_RUN
    long = [each for each in right if each["srt"] is not None and each["steps"] >= 10 * each["srt"]]
    words = [f"The first majority is right more often than not on {len(right)} of {len(every)} seeds."]
    for number, cell in enumerate((one, other)):
        kept = sum(each["rows"][number].kept >= GOAL for each in right)
        of_long = sum(each["rows"][number].kept >= GOAL for each in long)
        mean, of_all = (statistics.fmean(each["rows"][number].final for each in some) for some in (right, every))
        words.append(
            f"`{cell}` keeps {GOAL} of its best on {kept} of these {len(right)} ({of_long} of the {len(long)} whose runs are at least "
            f"ten times as long as srt lasted), and ends at {mean:.3f} in the mean of these seeds and at {of_all:.3f} in that of all."
        )
    for where, some in (("these seeds", right), ("the other seeds", [each for each in every if each not in right])):
        if some:
            found = paired.Pair([each["rows"][0].final - each["rows"][1].final for each in some])
            error = "" if found.error is None else f", with a standard error of {found.error:.3f}"
            words.append(f"`{one}` minus `{other}` is {found.mean:+.3f} in the mean of {where}{error}.")
    return " ".join(words)


@figure
def choice() -> str:
    """Return the final accuracy of every run that was made to choose a default, by start model, options and seed."""
    runs = summary.read(STUDY / "choice.jsonl")
    columns = sorted({run["seed"] for run in runs})
    rows: dict[tuple[str, str, int], dict[int, str]] = {}
    for run in runs:
        name = re.sub(r"^choice(, lazy)?: |, \d+ steps$", "", run["cell"])
        place = rows.setdefault((run["options"].get("base", "own"), name, run["options"]["steps"]), {})
        place[run["seed"]] = f"{summary.row_of(run).final:.2f}"
    lines = [f"| start model | options | steps | {' | '.join(f'seed {each}' for each in columns)} |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    lines += [
        f"| {base} | {name} | {steps} | {' | '.join(found.get(each, '') for each in columns)} |"
        for (base, name, steps), found in sorted(rows.items())
    ]
    return "\n".join(lines)


@figure
def lazy_share() -> str:
    """Return the share of the warm start's targets that have the planted answer."""
    return f"{LAZY_SHARE:.0%}"


@figure
def collapsed_below() -> str:
    """Return the share of its best accuracy below which a run has collapsed."""
    return f"{summary.COLLAPSED:.0%}"
