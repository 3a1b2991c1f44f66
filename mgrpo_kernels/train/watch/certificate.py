"""The certificate of a run: which signs of collapse its metrics showed and when, and how early the guard warned of a fall."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mgrpo_kernels.train.run.files import write_text
from mgrpo_kernels.train.watch.guard import LABEL_FREE, STEP_KEYS, WINDOW, Guard
from mgrpo_kernels.train.watch.lines import read_lines

CERTIFICATE = "certificate.json"
FALL = 0.05
"""Fall of the held-out accuracy below its best value so far to which the lead time of a warning refers."""


def certificate(lines: Iterable[Mapping[str, Any]], prompts: int, samples: int, guard: str = "warn") -> dict[str, Any]:
    """Return the certificate of a run from its lines of metrics.jsonl.

    The guard reads the lines again, so that a run without a guard has a certificate too. Actions are those that the lines contain.

    Args:
        lines: of metrics.jsonl, in order.
        prompts: number of held-out prompts in an evaluation; 0 without evaluation.
        samples: number of responses sampled for each of these prompts.
        guard: what the guard of the run was to do: off, warn, stop or rollback.
    """
    watcher = Guard(prompts, samples)
    warnings: list[dict[str, Any]] = []
    intervals: list[dict[str, Any]] = []
    present: dict[str, dict[str, Any]] = {}
    evaluated: list[tuple[int, float]] = []
    figures: dict[str, list[float]] = {}
    step = None
    for line in lines:
        step = line["step"]
        fires = bool(watcher.look(line))
        for name, text in watcher.signs.items():
            if name not in present:
                present[name] = {"sign": name, "from": step, "to": step, "values": text}
                intervals.append(present[name])
            present[name] |= {"to": step, "values": text}
        present = {name: each for name, each in present.items() if name in watcher.signs}
        if fires or line.get("guard") is not None:
            action = line.get("guard")
            label_free = sorted(watcher.signs.keys() & LABEL_FREE)
            warnings.append({"step": step, "action": action, "signs": dict(watcher.signs), "label_free": label_free})
            watcher.record(action or "warn")
        if line.get("eval_accuracy") is not None:
            evaluated.append((step, line["eval_accuracy"]))
        for key in STEP_KEYS:
            if line.get(key) is not None:
                figures.setdefault(key, []).append(line[key])
    fell = fall_step(evaluated)
    first = {
        name: next((each["step"] for each in warnings if not only or each["label_free"]), None)
        for name, only in (("lead_steps", False), ("lead_steps_label_free", True))
    }
    return {
        "steps": step,
        "guard": guard,
        "warnings": warnings,
        "signs": intervals,
        "figures": {key: trend(values) for key, values in figures.items()},
        "held_out": held_out(evaluated),
        "fall_step": fell,
        **{name: None if fell is None or warned is None else fell - warned for name, warned in first.items()},
    }


def fall_step(evaluated: list[tuple[int, float]]) -> int | None:
    """Return the step of the first evaluation whose accuracy is :data:`FALL` below the best before it; None if there is none."""
    best = -1.0
    for step, accuracy in evaluated:
        best = max(best, accuracy)
        if best - accuracy >= FALL - 1e-9:  # 0.45 of 0.5 counts, whatever the rounding
            return step
    return None


def held_out(evaluated: list[tuple[int, float]]) -> dict[str, Any] | None:
    """Return the first, best and last held-out accuracy; None without evaluation."""
    if not evaluated:
        return None
    chosen = {
        "first": evaluated[0],
        "best": max(evaluated, key=lambda each: (each[1], -each[0])),
        "last": evaluated[-1],
    }
    found: dict[str, Any] = {name: {"step": step, "accuracy": value} for name, (step, value) in chosen.items()}
    return {"evaluations": len(evaluated), **found}


def trend(values: list[float]) -> dict[str, float]:
    """Return the means of a metric over the first and over the last steps, and its extremes."""
    first, last = values[:WINDOW], values[-WINDOW:]
    return {
        "first": sum(first) / len(first),
        "last": sum(last) / len(last),
        "smallest": min(values),
        "largest": max(values),
    }


def write_certificate(output: Path, prompts: int, samples: int, guard: str) -> None:
    """Write certificate.json of the run in the directory `output`; the other arguments are those of :func:`certificate`."""
    lines = read_lines(output / "metrics.jsonl")
    text = json.dumps(certificate(lines, prompts, samples, guard), indent=1, allow_nan=False)
    write_text(output / CERTIFICATE, text + "\n")
