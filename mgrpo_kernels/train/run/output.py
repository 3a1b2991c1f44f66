"""The files that a run writes to its output directory, beside checkpoints and reports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from mgrpo_kernels.method import equal_to_gold
from mgrpo_kernels.train import parallel
from mgrpo_kernels.train.config import Config, build, read_yaml
from mgrpo_kernels.train.data.task import Task
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.update import Batch
from mgrpo_kernels.train.watch.metrics import Lines
from mgrpo_kernels.train.watch.report import read_lines


def check_output(output: Path, *, resume: bool) -> None:
    """Raise UsageError where `output` holds another run, or cannot be resumed."""
    holds_a_run = (output / "config.yaml").exists()
    if output.exists() and not output.is_dir():
        raise UsageError(f"output: expected a directory, got the file {output}")
    if holds_a_run and not resume:
        raise UsageError(f"output: expected a directory without a run, or --resume to go on with it, got {output}")
    if resume and not holds_a_run:
        raise UsageError(f"resume: expected a directory with a run (config.yaml), got {output}")


def check_resume(config: Config, output: Path) -> list[str]:
    """Return what has changed since the run in `output` began, a line each.

    Raises:
        UsageError: something that the steps already taken depend on.
    """
    before, now = build(read_yaml(output / "config.yaml")).values(), config.values()
    for name in ("model", "seed", "lora_rank", "lora_alpha", "lora_targets"):
        if now[name] != before[name]:
            raise UsageError(f"{name}: expected {before[name]}, which the run in {output} began with, got {now[name]}")
    return [f"changed: {name}: {before[name]} -> {now[name]}" for name in now if now[name] != before[name]]


def lines_of_first(path: Path, size: int) -> Lines | parallel.Nowhere:
    """Open a JSONL file, cut back to its first `size` bytes, where this rank writes it."""
    return Lines(path, size) if parallel.is_first() else parallel.Nowhere()


def save_batch(directory: Path, step: int, batch: Batch) -> Path:
    """Save the batch of a step that was skipped, each rank its own, for torch.load; return its path."""
    directory.mkdir(exist_ok=True)
    rank = f"_rank_{parallel.rank()}" if parallel.world() > 1 else ""
    path = directory / f"step_{step}{rank}.pt"
    torch.save(dict(batch._asdict()), path)
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def with_truth(samples: list[dict[str, Any]], task: Task) -> list[dict[str, Any]]:
    """Return lines for samples.jsonl with "correct": whether the answer equals the true one, None where that is not known."""
    correct = equal_to_gold([each["answer"] for each in samples], [each["gold"] for each in samples], task.equivalence)
    return [
        {**each, "correct": None if math.isnan(value) else value == 1.0}
        for each, value in zip(samples, correct.tolist(), strict=True)
    ]


def closing(output: Path, config: Config) -> list[str]:
    """Return the last lines that a run prints: the result, where the files are, and what to try next."""
    metrics = read_lines(output / "metrics.jsonl")
    accuracy = [line["eval_accuracy"] for line in metrics if line.get("eval_accuracy") is not None]
    lines = (
        [f"held-out accuracy {accuracy[0]:.3f} -> {accuracy[-1]:.3f} (best {max(accuracy):.3f})"] if accuracy else []
    )
    lines.append(
        f"written: {output}/report.html, curves.png, metrics.jsonl, samples.jsonl; the model is in {output}/final"
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
