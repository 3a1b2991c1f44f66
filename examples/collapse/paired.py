"""Compare two cells of the collapse study in pairs of runs with the same seed on the same machine.

    python examples/collapse/paired.py              prints what the IQR filter changed, by pair of cells
    python examples/collapse/paired.py --until 250  does so for the first 250 steps of each run

The difference is that of the final accuracies, as in summary.py. Its standard error is that of the mean over the pairs. Files of results
are machines: a seed gives another start model on each.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from study import read
from summary import row_of, until

OWN = Path(__file__).parent
FILES = ("results", "results_xeon", "results_zen3", "results_zen3_more", "results_new_seeds", "results_second")
OF_FILTER = (
    ("srt + IQR", "srt"),
    ("srt + IQR, scope vote", "srt"),
    ("mgrpo", "srt + momentum"),
    ("mgrpo, N = G/2", "srt + momentum, N = G/2"),
    ("steady", "momentum labels"),
    ("lazy: srt + IQR", "lazy: srt"),
    ("lazy: srt + IQR, scope vote", "lazy: srt"),
    ("lazy: mgrpo", "lazy: srt + momentum"),
    ("lazy: mgrpo, N = G/2", "lazy: srt + momentum, N = G/2"),
    ("lazy: steady", "lazy: momentum labels"),
)
"""Cells with the filter, and the same cells without it."""
OF_QUARTILES = tuple(
    (f"{base}srt + IQR{kind}, 300 steps", f"{base}srt, 300 steps")
    for base in ("", "lazy: ")
    for kind in ("", ", batch", ", history", ", length")
)
"""The same with each comparison of the entropies (quartiles.py)."""


class Pair(NamedTuple):
    """The differences of the final accuracies of two cells, one for each pair of runs."""

    differences: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def error(self) -> float | None:
        """The standard error of the mean; None for fewer than two pairs."""
        n = len(self.differences)
        return statistics.stdev(self.differences) / math.sqrt(n) if n > 1 else None


def pair(one: str, other: str, files: list[list[dict[str, Any]]]) -> Pair:
    """Return `one` minus `other` for each seed that a file has of both, with runs of the same number of steps."""
    differences = []
    for runs in files:
        found = {(run["cell"], run["seed"], run["options"]["steps"]): row_of(run).final for run in runs}
        differences += [
            final - found[(other, seed, steps)]
            for (cell, seed, steps), final in found.items()
            if cell == one and (other, seed, steps) in found
        ]
    return Pair(differences)


def table(pairs: list[tuple[str, str]], files: list[list[dict[str, Any]]]) -> str:
    """Return the table in Markdown."""
    lines = ["| cell | minus | pairs | mean difference | standard error | better, worse |", "|---|---|---|---|---|---|"]
    for one, other in pairs:
        found = pair(one, other, files)
        if found.differences:
            error = "-" if found.error is None else f"{found.error:.2f}"
            better, worse = (sum(sign * each > 0.05 for each in found.differences) for sign in (1, -1))
            lines.append(
                f"| {one} | {other} | {len(found.differences)} | {found.mean:+.2f} | {error} | {better}, {worse} |"
            )
    return "\n".join(lines)


def results(last: int | None = None) -> list[list[dict[str, Any]]]:
    """Return the runs of each file of the project's results, cut after `last` steps."""
    files = [read(OWN / f"{name}.jsonl") for name in FILES]
    return files if last is None else [[until(run, last) for run in runs] for runs in files]


def main() -> None:
    """Print the table of the filter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--until", type=int, metavar="STEP", help="use only evaluations up to this step (default: all)")
    print(table(list(OF_FILTER), results(parser.parse_args().until)))


if __name__ == "__main__":
    main()
