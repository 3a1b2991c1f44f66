"""The table of faults that ``make torture`` does to runs, from docs/torture.json, which it writes. How a page asks for it: see spans.py."""

from __future__ import annotations

import json
from pathlib import Path

from figures import figure

RECORDED = Path(__file__).resolve().parent / "torture.json"


@figure
def torture() -> str:
    """Return the table of faults."""
    rows = json.loads(RECORDED.read_text(encoding="utf-8"))
    lines = [
        f"| {row['fault']} | {row['tried']} | {row['lost']} | {row['hung']} | {row['misleading']} |" for row in rows
    ]
    return "\n".join(["| fault | tried | lost | hung | misleading |", "|---|---|---|---|---|", *lines])
