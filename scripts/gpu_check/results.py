"""The JSON files of a check, each computed from the rows that were finished so far."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from gpu_check.rows import LOST, Run, read

TESTS, BENCHMARKS, TUNING, ENVIRONMENT, PROFILE = "tests/", "benchmarks/", "tuning", "environment", "profile"


def tests(runs: dict[str, Run]) -> dict[str, Any]:
    """Return tests.json: every test with its outcome, the text of a failure and the figures that it recorded."""
    result: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "lost": [], "runs": {}, "tests": []}
    for run in runs.values():
        if not run.name.startswith(TESTS):
            continue
        for row in run.rows.values():
            if row["outcome"] in LOST:
                result["lost"].append(row["row"])
            else:
                result[row["outcome"]] += 1
            result["tests"].append(
                {"figures": {}, **{key: value for key, value in row.items() if key != "row"}, "test": row["row"]}
            )
        result["lost"] += run.not_finished
        result["runs"][run.name.removeprefix(TESTS)] = {"ends": run.ends, "not_finished": run.not_finished}
    return result


def benchmarks(runs: dict[str, Run]) -> dict[str, Any]:
    """Return benchmarks.json, as pytest-benchmark writes it and benchmarks/report.py reads it."""
    result: dict[str, Any] = {"benchmarks": [], "runs": {}}
    for run in runs.values():
        if not run.name.startswith(BENCHMARKS):
            continue
        result = {**run.session, **result}
        measured = [row["benchmark"] for row in run.rows.values() if row.get("benchmark")]
        result["benchmarks"] += [each for each in measured if "p50_ms" in each["extra_info"]]
        result["runs"][run.name.removeprefix(BENCHMARKS)] = {
            "ends": run.ends,
            "not_finished": run.not_finished,
            "not_measured": {
                row["row"].rpartition("::")[2]: f"{row['outcome']}: {row.get('text', '')[-500:]}"
                for row in run.rows.values()
                if not row.get("benchmark")
            },
        }
    return result


def environment(runs: dict[str, Run]) -> dict[str, Any]:
    """Return environment.json: device, versions, commit, copy bandwidth and matmul rate; None for what could not be measured."""
    result: dict[str, Any] = {}
    for row in runs[ENVIRONMENT].rows.values() if ENVIRONMENT in runs else []:
        result |= row["found"] if "found" in row else {f"{row['row']}, {row['outcome']}": row.get("text", "")[-500:]}
    return result


def profile(runs: dict[str, Run]) -> dict[str, Any]:
    """Return profile.json: the kernels of one step of each op, or why there are none."""
    result: dict[str, Any] = {}
    for row in runs[PROFILE].rows.values() if PROFILE in runs else []:
        result.setdefault("ops", {})[row["row"]] = row.get("kernels", row.get("text", ""))
        if "sizes" in row:
            result["sizes"] = row["sizes"]
    return result


def write(place: Path, content: Any) -> None:
    """Write a result in one go: a reader never sees half a file."""
    new = place.with_name(f"{place.name}.{threading.get_ident()}.new")  # several threads may write one
    new.write_text(content if isinstance(content, str) else json.dumps(content, indent=1) + "\n", encoding="utf-8")
    new.replace(place)


def write_all(out: Path) -> dict[str, Run]:
    """Write every JSON file for which there is a row, and return what the log says."""
    runs = read(out / "rows.jsonl")
    for name, content in (
        ("environment", environment(runs)),
        ("tests", tests(runs)),
        ("benchmarks", benchmarks(runs)),
        ("profile", profile(runs)),
    ):
        if content and content.get("runs", True):
            write(out / f"{name}.json", content)
    return runs
