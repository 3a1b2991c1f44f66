"""The files that a run writes to its output directory, beside checkpoints and reports."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mgrpo_kernels.method import Gold, equal_to_gold
from mgrpo_kernels.train import parallel
from mgrpo_kernels.train.config import Config, build, read_yaml
from mgrpo_kernels.train.data.task import Task
from mgrpo_kernels.train.errors import CheckpointError, UsageError
from mgrpo_kernels.train.run import checkpoint
from mgrpo_kernels.train.run.evaluation import derived
from mgrpo_kernels.train.update import Batch
from mgrpo_kernels.train.watch.lines import Lines, check_size, parse_lines, read_lines
from mgrpo_kernels.train.watch.uncertainty import ERRORS, is_beyond, with_error

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


def check_output(output: Path, *, resume: bool) -> checkpoint.Facts | None:
    """Return the newest complete checkpoint of the run in `output` that is to be resumed, None where it starts from its first step.

    Nothing is written. What looks like a run's work is never taken for an empty directory.

    Raises:
        UsageError: `output` contains another run, or cannot be resumed.
        CheckpointError: it has checkpoints, and none is complete.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"output: expected a directory, got the file {output}")
    directory, configured = output / "checkpoints", (output / "config.yaml").exists()
    there = checkpoint.candidates(directory)
    if not resume:
        work = [] if not output.exists() else work_in(output)
        if configured or there or work:
            raise UsageError(
                f"output: expected a directory without a run, or --resume to continue it, got {output}"
                + ("" if configured else f", which contains {', '.join([*(each.name for each in there), *work])}")
            )
        return None
    if not configured:
        raise UsageError(
            f"resume: expected a directory with a run (config.yaml), got {output}; a run that has not begun starts without --resume"
        )
    found = checkpoint.complete(directory)
    if found:
        check_size(output / METRICS, found[0]["metrics_bytes"])
        check_size(output / SAMPLES, found[0]["samples_bytes"])
        return found[0]
    if there:
        try:
            checkpoint.load(there[0])
        except CheckpointError as error:
            raise CheckpointError(f"{error}; none of the {len(there)} in {directory} is complete") from error
    work = work_in(output)
    if work and not (directory / checkpoint.NONE_YET).exists():
        raise UsageError(
            f"resume: expected a complete checkpoint in {directory}, got none, while the run has written {' and '.join(work)}: copy the "
            "checkpoints from where the run was, or start again with another --output"
        )
    return None


def work_in(output: Path) -> list[str]:
    """Return the names of what a run has written into a directory, other than its configuration, its base model and checkpoints."""
    names = (METRICS, SAMPLES, "final")
    return [
        name
        for name in names
        if (output / name).is_dir() or ((output / name).exists() and (output / name).stat().st_size)
    ]


def check_resume(config: Config, output: Path) -> list[str]:
    """Return what has changed since the run in `output` began, a line each.

    Raises:
        UsageError: something that the steps already taken depend on has changed.
    """
    before, now = build(read_yaml(output / "config.yaml")).values(), config.values()
    for name in ("model", "revision", "seed", "lora_rank", "lora_alpha", "lora_targets"):
        if now[name] != before[name]:
            raise UsageError(f"{name}: expected {before[name]}, which the run in {output} began with, got {now[name]}")
    return [f"changed: {name}: {before[name]} -> {now[name]}" for name in now if now[name] != before[name]]


def open_lines(path: Path, size: int, unwritten: list[str], warn: Callable[[str], None]) -> Lines | parallel.Nowhere:
    """Open a JSONL file, cut back to its first `size` bytes, on the rank that writes it."""
    return Lines(path, size, unwritten=unwritten, warn=warn) if parallel.is_first() else parallel.Nowhere()


def past_lines(path: Path, size: int, unwritten: list[str]) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that belong to the steps before a checkpoint."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        content = file.read(size)
    return parse_lines(content) + [json.loads(line) for line in unwritten]


def save_batch(directory: Path, step: int, batch: Batch) -> str:
    """Save the batch of a step that was skipped, each rank its own, for torch.load; return where it is, or why it is not."""
    rank = f"_rank_{parallel.rank()}" if parallel.world() > 1 else ""
    path = directory / f"step_{step}{rank}.pt"
    try:
        directory.mkdir(exist_ok=True)
        torch.save(dict(batch._asdict()), path)
    except (OSError, RuntimeError) as error:  # torch's writer raises the second for a full disk
        return f"its batch could not be saved: {error}"
    return f"its batch is in {path}"


def _in_words(gold: Gold | None) -> str | None:
    return " or ".join(gold) if isinstance(gold, tuple) else gold


def with_truth(samples: list[dict[str, Any]], task: Task) -> list[dict[str, Any]]:
    """Return lines for samples.jsonl with "correct": whether the answer equals the true one, None where that is not known."""
    correct = equal_to_gold([each["answer"] for each in samples], [each["gold"] for each in samples], task.equivalence)
    return [
        {**each, "gold": _in_words(each["gold"]), "correct": None if math.isnan(value) else value == 1.0}
        for each, value in zip(samples, correct.tolist(), strict=True)
    ]


def closing(output: Path, config: Config) -> list[str]:
    """Return the last lines that a run prints: the result, where the files are, and what to try next."""
    metrics = read_lines(output / METRICS)
    lines = result(metrics)
    lines.append(
        f"written: {output}/report.html, curves.png, metrics.jsonl, samples.jsonl, certificate.json; the model is in {output}/final"
    )
    if config.model.model is None:
        command = "python -m mgrpo_kernels.train"
        lines += [
            "try next:",
            f"  {command} --method srt --steps 1500  # the vote alone",
            f"  {command} --method gold              # the true answers",
            f"  {command} --model DIR --data FILE    # yours; see --help",
        ]
    return lines


def result(metrics: list[dict[str, Any]]) -> list[str]:
    """Return the held-out accuracy before and after the run, the change between them, and the best where there was a better one."""
    evaluated = {line["step"]: line for line in metrics if line.get("eval_accuracy") is not None}
    if not evaluated:
        return []

    def accuracy(line: dict[str, Any]) -> str:
        return with_error(line["eval_accuracy"], line.get("eval_accuracy_error"))

    first, *_, last = [*evaluated.values(), *evaluated.values()]
    lines = [f"held-out accuracy {accuracy(first)} -> {accuracy(last)}"]
    change, error = (last.get(f"eval_accuracy_{name}") for name in ("change", "change_error"))
    if change is not None:
        by_chance = change != 0 and error is not None and not is_beyond(change, error)
        note = f", which may be chance (less than {ERRORS:g} standard errors)" if by_chance else ""
        lines.append(f"change, prompt by prompt: {with_error(change, error, sign=True)}{note}")
    for key in (key for key in last if key.startswith("eval_accuracy/")):
        parts = [with_error(line[key], line.get(derived(key, "error"))) for line in (first, last)]
        change = last.get(derived(key, "change"))
        by = (
            ""
            if change is None
            else f", change {with_error(change, last.get(derived(key, 'change_error')), sign=True)}"
        )
        lines.append(f"  {key.partition('/')[2]}: {parts[0]} -> {parts[1]}{by}")
    best = evaluated.get(last.get("eval_best_step"))
    if best is not None:
        lines.append(f"best: {accuracy(best)}, at step {best['step']}")
    return lines
