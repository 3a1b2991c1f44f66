"""Print the table of the collapse study, and draw its figures, from its results.

    python examples/collapse/summary.py                        prints the table
    python examples/collapse/summary.py --figures docs/        also draws docs/collapse_*.png
    python examples/collapse/summary.py --until 250            uses the first 250 steps of each run only
    python examples/collapse/summary.py --by-seed entropy      prints a metric of each seed's last evaluation
    python examples/collapse/summary.py --by-seed kept         prints each seed's ratio of final to best accuracy
    python examples/collapse/summary.py --results FILE --against examples/collapse/results.jsonl    compares results with the project's

Accuracies are means over :data:`WINDOW` consecutive evaluations, so that one lucky evaluation does not count as the best. A run has
collapsed at the first evaluation at which this mean is below :data:`COLLAPSED` of its best so far.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from study import AVERAGED, KEPT, read

WINDOW = 3
COLLAPSED = 0.8


class Row(NamedTuple):
    """The accuracies of one run, and the step at which it collapsed."""

    start: float
    best: float
    final: float
    collapse: int | None  # step

    @property
    def kept(self) -> float:
        return self.final / self.best


def smooth(values: Sequence[float]) -> list[float]:
    """Return for each value the mean of it and the values before it, over at most :data:`WINDOW` values."""
    return [statistics.fmean(values[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(values))]


def row_of(run: dict[str, Any]) -> Row:
    accuracy, steps = smooth(run["curve"]["eval_accuracy"]), run["curve"]["step"]
    best, collapse = 0.0, None
    for value, step in zip(accuracy, steps, strict=True):
        best = max(best, value)
        if value < COLLAPSED * best:
            collapse = step
            break
    return Row(run["curve"]["eval_accuracy"][0], max(accuracy), accuracy[-1], collapse)


def by_cell(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of each cell, with cells in the order of the file and seeds in ascending order."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        cells.setdefault(run["cell"], []).append(run)
    return {cell: sorted(of, key=lambda run: run["seed"]) for cell, of in cells.items()}


def until(run: dict[str, Any], last: int) -> dict[str, Any]:
    """Return a run as if it had ended after `last` steps."""
    kept = sum(step <= last for step in run["curve"]["step"])
    return {**run, "curve": {key: column[:kept] for key, column in run["curve"].items()}}


def table(cells: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table in Markdown: means over seeds, the range of the final accuracy, and the least ratio of final to best accuracy."""
    lines = [
        "| cell | seeds | start | best | final (least - most) | final / best (least) | pruned | collapsed | at step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, runs in cells.items():
        rows = [row_of(run) for run in runs]
        final = [row.final for row in rows]
        steps = sorted(row.collapse for row in rows if row.collapse is not None)
        start, best, kept = (statistics.fmean(getattr(row, name) for row in rows) for name in ("start", "best", "kept"))
        pruned = statistics.fmean(
            value for run in runs for value in run["curve"]["pruned_fraction"] if value is not None
        )
        at = ", ".join(map(str, steps)) or "-"
        lines.append(
            f"| {cell} | {len(rows)} | {start:.2f} | {best:.2f} | {statistics.fmean(final):.2f} ({min(final):.2f} - {max(final):.2f}) "
            f"| {kept:.3f} ({min(row.kept for row in rows):.3f}) | {pruned:.1%} | {len(steps)} of {len(rows)} | {at} |"
        )
    return "\n".join(lines)


def by_seed(cells: dict[str, list[dict[str, Any]]], key: str) -> str:
    """Return a table by seed, with means: the last value of a metric, or the ratio of final to best accuracy."""
    digits = 3 if key == "kept" else 2
    seeds = sorted({run["seed"] for runs in cells.values() for run in runs})
    lines = [f"| {key} | {' | '.join(map(str, seeds))} | mean |", f"|---|{'---|' * len(seeds)}---|"]
    for cell, runs in cells.items():
        last = {run["seed"]: row_of(run).kept if key == "kept" else run["curve"][key][-1] for run in runs}
        values = " | ".join(f"{last[seed]:.{digits}f}" if seed in last else "" for seed in seeds)
        lines.append(f"| {cell} | {values} | {statistics.fmean(last.values()):.{digits}f} |")
    return "\n".join(lines)


def comparison(cells: dict[str, list[dict[str, Any]]], others: dict[str, list[dict[str, Any]]]) -> str:
    """Return a table that compares two studies: whether each cell's mean is within the other's range, and how many runs are equal."""
    lines = [
        "| cell | final | theirs (least - most) | within | collapsed | theirs | same curve |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell, runs in cells.items():
        if cell in others:
            rows, theirs = ([row_of(run) for run in each] for each in (runs, others[cell]))
            curves = {run["seed"]: run["curve"]["eval_accuracy"] for run in others[cell]}
            same = sum(run["curve"]["eval_accuracy"] == curves.get(run["seed"]) for run in runs)
            final, band = statistics.fmean(row.final for row in rows), [row.final for row in theirs]
            fallen, theirs_fallen = (
                f"{sum(r.collapse is not None for r in each)} of {len(each)}" for each in (rows, theirs)
            )
            lines.append(
                f"| {cell} | {final:.2f} | {min(band):.2f} - {max(band):.2f} | {'yes' if min(band) <= final <= max(band) else 'no'} "
                f"| {fallen} | {theirs_fallen} | {same} of {len(rows)} |"
            )
    return "\n".join(lines)


def draw(cells: dict[str, list[dict[str, Any]]], path: Path, keys: Sequence[str]) -> None:
    """Draw one panel for each metric: the mean over seeds, and a band from the least to the most."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(keys), figsize=(5 * len(keys), 3.6), squeeze=False, layout="constrained")
    for axis, key in zip(axes[0], keys, strict=True):
        for cell, runs in cells.items():
            steps = runs[0]["curve"]["step"]
            columns = [
                [value for value in each if value is not None]
                for each in zip(*(run["curve"][key] for run in runs), strict=True)
            ]
            known = [(step, values) for step, values in zip(steps, columns, strict=True) if values]
            at = [step for step, _ in known]
            (line,) = axis.plot(at, [statistics.fmean(values) for _, values in known], label=cell, linewidth=1.4)
            axis.fill_between(
                at,
                [min(values) for _, values in known],
                [max(values) for _, values in known],
                alpha=0.12,
                color=line.get_color(),
            )
        axis.set(title=key.replace("_", " "), xlabel="step")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the table, and draw the figures if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = Path(__file__).parent / "results.jsonl"
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[own], metavar="FILE", help="files of results, which are combined"
    )
    parser.add_argument("--against", type=Path, metavar="FILE", help="results to compare with")
    parser.add_argument("--until", type=int, metavar="STEP", help="use only evaluations up to this step (default: all)")
    parser.add_argument(
        "--by-seed",
        choices=["kept", *KEPT[1:], *AVERAGED],
        metavar="COLUMN",
        help="print this metric by seed; kept is the ratio of final to best accuracy",
    )
    parser.add_argument("--figures", type=Path, metavar="DIR")
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="cells in the figures (default: the first five)")
    given = parser.parse_args()
    runs = [run for path in given.results for run in read(path)]
    cells = by_cell(runs if given.until is None else [until(run, given.until) for run in runs])
    print(table(cells) if given.by_seed is None else by_seed(cells, given.by_seed))
    if given.against is not None:
        print(f"\ncompared with {given.against}:\n\n{comparison(cells, by_cell(read(given.against)))}")
    if given.figures is not None:
        shown = {cell: cells[cell] for cell in given.cells or list(cells)[:5]}
        draw(shown, given.figures / "collapse_accuracy.png", ["eval_accuracy", "eval_greedy"])
        draw(
            shown,
            given.figures / "collapse_signs.png",
            ["vote_share", "top_answer_share", "entropy", "pruned_fraction"],
        )


if __name__ == "__main__":
    main()
