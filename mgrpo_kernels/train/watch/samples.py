"""The responses in the report: samples of training, and held-out responses before and after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mgrpo_kernels.train.watch.html_parts import paragraph, quoted, table

SHOWN = 3
"""Held-out prompts that are shown of those whose answers have improved most, and of those that have got worse."""
CLASSES = {"right": "right", "agrees": "right", "no answer": "none"}
"""Classes of rows by their verdict; any other verdict is wrong."""


def samples(rows: list[dict[str, Any]]) -> str:
    """Return samples of the run's start, middle and end."""
    if not rows:
        return "<p>None were kept (--samples-per-step).</p>"
    columns = ("", "response", "answer", "reward", "entropy", "notes")
    parts = []
    for title, steps in chosen_steps(rows).items():
        parts.append(f"<h3>{title}</h3>")
        for step in sorted(steps):
            group = [each for each in rows if each["step"] == step]
            parts.append(quoted(f"step {step}, prompt", group[0]["prompt"]))
            known = "" if group[0]["gold"] is None else f"; true answer: {group[0]['gold']}"
            label = "none" if group[0]["label"] is None else group[0]["label"]
            parts.append(paragraph(f"label: {label}{known}"))
            body = [
                (verdict(each), each["response"], each["answer"], each["reward"], each["entropy"], _notes(each))
                for each in group
            ]
            classes = [CLASSES.get(row[0], "wrong") for row in body]
            parts.append(f'<div class="samples">{table(columns, body, classes)}</div>')
    return "".join(parts)


def _notes(sample: dict[str, Any]) -> str:
    notes = [
        "by the momentum model" if sample["sampled_by"] == "momentum" else "",
        "pruned" if sample["pruned"] else "",
        "" if sample["finished"] else "cut at the longest length",
    ]
    return ", ".join(filter(None, notes))


def verdict(sample: dict[str, Any]) -> str:
    """Return whether an answer is right, or, where the truth is not known, whether it agrees with the label; or that there is none."""
    if sample["answer"] is None:
        return "no answer"
    if sample.get("correct") is not None:
        return "right" if sample["correct"] else "wrong"
    return "agrees" if sample["answer"] == sample["label"] else "differs"


def chosen_steps(rows: list[dict[str, Any]]) -> dict[str, set[int]]:
    """Return the steps to show of start, middle and end: one each, and the nearest that shows what it lacks.

    So right and wrong are seen side by side where there are both within a tenth of the run.
    """
    found: dict[int, set[str]] = {}
    for each in rows:
        found.setdefault(each["step"], set()).add(verdict(each))
    steps = sorted(found)
    places = {"Start": steps[0], "Middle": steps[(len(steps) - 1) // 2], "End": steps[-1]}
    chosen: dict[str, set[int]] = {}
    taken: set[int] = set()
    for title, at in places.items():
        if at in taken:
            continue
        near = [
            step
            for step in sorted(steps, key=lambda step: abs(step - at))
            if 10 * abs(step - at) <= steps[-1] - steps[0]
        ]
        more = next((step for step in near if found[step] - found[at]), at)
        chosen[title] = {at, more}
        taken |= chosen[title]
    return chosen


def held_out(first: Sequence[dict[str, Any]], last: Sequence[dict[str, Any]]) -> str:
    """Return the greedy responses before and after training to the held-out prompts that have changed most.

    `first` and `last` are the lines of held_out/step_N.jsonl of the first and the last evaluation.
    """
    if not first or [each["prompt"] for each in first] != [each["prompt"] for each in last]:
        return "<p>There are no responses of two evaluations of the same prompts.</p>"

    def gain(pair: tuple[dict[str, Any], dict[str, Any]]) -> int:
        return int(sum(pair[1]["right"]) - sum(pair[0]["right"]))

    pairs = sorted(zip(first, last, strict=True), key=gain, reverse=True)
    chosen = pairs if len(pairs) <= 2 * SHOWN else [*pairs[:SHOWN], *pairs[-SHOWN:]]
    parts = [
        paragraph("The prompts that have gained and lost most; held_out/ in the output directory has all responses.")
    ]
    for before, after in chosen:
        gold = before["gold"] if isinstance(before["gold"], str) else " or ".join(before["gold"] or ())
        parts += [quoted("prompt", before["prompt"]), paragraph(f"true answer: {gold}")]
        body = [
            (when, f"{sum(each['right'])} of {len(each['right'])}", each["greedy_response"], each["greedy"])
            for when, each in (("before", before), ("after", after))
        ]
        parts.append(f'<div class="samples">{table(("", "samples right", "greedy response", "answer"), body)}</div>')
    return "".join(parts)
