"""What other libraries' own tests say with our ops in place, from docs/peer_suites.json (scripts/peer_suites.sh). See spans.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from figures import figure

RECORDED = Path(__file__).resolve().parent / "peer_suites.json"


def count(result: dict[str, Any], outcome: str) -> int:
    """Return how many tests had this outcome without our ops."""
    return int(result["outcomes"].get(outcome, 0))


@figure
def peer_suite(peer: str) -> str:
    """Return the last result for a library as a sentence."""
    result = json.loads(RECORDED.read_text(encoding="utf-8"))[peer]
    ran = count(result, "passed") + count(result, "failed")
    different = len(result["different"])
    same = f"{ran - different} of {ran} tests end alike with our ops and without"
    calls = ", ".join(f"{number} of them call `{op}`" for op, number in sorted(result["tests_that_call"].items()))
    parts = [f"{same} ({count(result, 'passed')} pass, {count(result, 'failed')} fail without them)", calls]
    if result["pytest_options"]:
        parts.append(f"pytest was given `{' '.join(result['pytest_options'])}`")
    if skipped := count(result, "skipped"):
        parts.append(f"{skipped} are skipped")
    if result["not_collected"]:
        parts.append(f"{len(result['not_collected'])} file of tests is for another version and cannot be imported")
    return "; ".join(filter(None, parts))
