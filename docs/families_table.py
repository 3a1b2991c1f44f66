"""The table of model families from docs/families.json, which tests/family_sweep.py writes. How a page asks for it: see spans.py."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from figures import figure

RECORDED = Path(__file__).resolve().parent / "families.json"
SAMPLING = {
    "SharedCache": "shared prompts",
    "PaddedCache": "own cache",
    "UnpaddedCache": "own cache, by length",
    "NoCache": "no cache",
}
"""What the table calls each way of sampling."""


def recorded() -> dict[str, Any]:
    """Return the result of the sweep."""
    result: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return result


def cell(text: str) -> str:
    """Return a text as one cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def row_of(row: dict[str, Any]) -> str:
    """Return a family's row."""
    works = row["outcome"] in ("works", "partly")
    batches = ("packs" if row["packs"] else "pads") if works else "-"
    sampling = SAMPLING[row["sampling"]] if works else "-"
    head = row.get("fused_head", "-")
    result = {"none": "not tried", "partly": "works, but"}.get(row["outcome"], row["outcome"])
    cells = (
        f"`{row['family']}`",
        result,
        batches,
        sampling,
        head.partition(":")[0],
        f"`{row['notes']}`" if row["notes"] else "",
    )
    return f"| {' | '.join(map(cell, cells))} |"


@figure
def families() -> str:
    """Return the table of model families."""
    rows = [row_of(row) for row in recorded()["families"]]
    return "\n".join(
        ["| family | trainer | sequences | sampling | fused head | reason |", "|---|---|---|---|---|---|", *rows]
    )


@figure
def family_counts() -> str:
    """Return how many families work, are refused or could not be tried, and of which release of transformers."""
    result = recorded()
    count = Counter(row["outcome"] for row in result["families"])
    heads = sum(row.get("fused_head") == "yes" for row in result["families"])
    assert not count["wrong"], "a family is wrong"
    works = count["works"] + count["partly"]
    return (
        f"Of the {len(result['families'])} causal architectures of transformers {result['transformers']}, the trainer works on {works}, "
        f"refuses {count['refused']}, and {count['none']} could not be tried; the fused head works on {heads}"
    )
