"""Count how early the guard warned before collapse, and how often it warned without one, from the certificates of the study's runs.

    python examples/collapse/warned.py                  prints the table of the runs in results_second.jsonl and choice.jsonl
    python examples/collapse/warned.py --results FILE   prints that of other results of study.py

A run counts as collapsing as in summary.py, and as healthy otherwise. A collapsing run is warned of in time if the first warning came at
least :data:`LEAD` steps before the first evaluation whose accuracy is 0.05 below the best before it. A warning in a healthy run is a false
alarm. Results of the study's first edition have no certificate and are left out.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from study import read
from summary import row_of

OWN = Path(__file__).parent
LEAD = 50
IN_TIME, FALSE_ALARMS = 0.9, 0.05
"""The aim: the smallest share of collapsing runs with a warning in time, and the largest share of healthy runs with a warning."""


class Counts(NamedTuple):
    """What the guard did in some runs."""

    collapsing: int
    before: int  # collapsing runs with a warning before the fall
    in_time: int  # those with a warning at least LEAD steps before it
    leads: list[int]  # steps from the first warning to the fall, of the collapsing runs that were warned of
    healthy: int
    false_alarms: int

    @property
    def met(self) -> tuple[bool | None, bool | None]:
        """Whether each half of the aim is met; None without a run that it is about."""
        return (
            self.in_time >= IN_TIME * self.collapsing if self.collapsing else None,
            self.false_alarms <= FALSE_ALARMS * self.healthy if self.healthy else None,
        )


def count(runs: list[dict[str, Any]], label_free: bool) -> Counts:
    """Return the counts for runs with certificates: of all warnings, or only of those with a sign that needs no true answer."""
    leads, missed, healthy, alarms = [], 0, 0, 0
    for run in runs:
        found = run["certificate"]
        warned = any(each["label_free"] or not label_free for each in found["warnings"])
        if row_of(run).collapse is None:
            healthy += 1
            alarms += warned
        elif (lead := found["lead_steps_label_free" if label_free else "lead_steps"]) is None:
            missed += 1
        else:
            leads.append(lead)
    before, in_time = (sum(lead >= least for lead in leads) for least in (1, LEAD))
    return Counts(len(leads) + missed, before, in_time, leads, healthy, alarms)


def table(runs: list[dict[str, Any]]) -> str:
    """Return the table in Markdown, by base model and by the signs that count, with a verdict in each row."""
    columns = ("start model", "signs", "collapsing runs", "warned before the fall", f"at least {LEAD} steps before")
    columns += ("median lead, steps", "healthy runs", "false alarms", "aim")
    rows: list[tuple[object, ...]] = [columns, ("---",) * len(columns)]
    for base in ("own", "lazy", "both"):
        of_base = [run for run in runs if base in ("both", run["options"].get("base", "own"))]
        for signs, label_free in (("all", False), ("label-free", True)):
            found = count(of_base, label_free)
            early = (share(part, found.collapsing) for part in (found.before, found.in_time))
            median = f"{statistics.median(found.leads):g}" if found.leads else "-"
            alarms = share(found.false_alarms, found.healthy)
            rows.append((base, signs, found.collapsing, *early, median, found.healthy, alarms, verdict(*found.met)))
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.0%})" if whole else "-"


def verdict(in_time: bool | None, alarms: bool | None) -> str:
    """Return which halves of the aim are met."""
    words = {True: "met", False: "missed", None: "-"}
    return f"warnings {words[in_time]}, false alarms {words[alarms]}"


def with_certificate(paths: list[Path]) -> list[dict[str, Any]]:
    """Return the runs of files of results that have a certificate, and whose guard only watched."""
    return [run for path in paths for run in read(path) if "certificate" in run and run["options"]["guard"] == "off"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = [OWN / f"{name}.jsonl" for name in ("results_second", "choice")]
    parser.add_argument("--results", type=Path, nargs="+", default=own, metavar="FILE", help="files of results")
    print(table(with_certificate(parser.parse_args().results)))


if __name__ == "__main__":
    main()
