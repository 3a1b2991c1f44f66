"""Checkpoints that are complete or not there.

A checkpoint is written beside its place, brought to the disk, and then renamed; ``latest`` is a link that is replaced in one go. So a
run killed at any moment leaves ``latest`` naming a complete checkpoint, or nothing. Random numbers and the order of the data follow
from the seed and the step, so a step number is all the state that they have.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, TypedDict

import torch

from mgrpo_kernels.train.config import UsageError
from mgrpo_kernels.train.step import Learner


class State(TypedDict):
    """What a checkpoint holds."""

    step: int
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    momentum: dict[str, Any] | None
    metrics_bytes: int  # the size of metrics.jsonl at that step
    samples_bytes: int


def save(
    directory: Path,
    learner: Learner,
    step: int,
    metrics_bytes: int,
    samples_bytes: int,
    keep: int,
    best: int | None = None,
) -> Path:
    """Write ``directory/step_N`` and let ``latest`` name it; return its path.

    Then delete all but the `keep` newest (0: none) and that of the step `best`.
    """
    state: State = {
        "step": step,
        "model": learner.policy.model.state_dict(),
        "optimizer": learner.optimizer.state_dict(),
        "momentum": None if learner.momentum is None else learner.momentum.state_dict(),
        "metrics_bytes": metrics_bytes,
        "samples_bytes": samples_bytes,
    }
    place, new = directory / f"step_{step}", directory / f".step_{step}.new"
    if latest(directory) == place:
        return place  # the very step that the run was resumed from
    for leftover in [new, *(each for each in directory.glob("step_*") if step_of(each) >= step)]:
        if leftover.exists():  # of a run that was killed while it saved
            shutil.rmtree(leftover)
    new.mkdir(parents=True)
    with (new / "state.pt").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(new)
    new.rename(place)
    sync_directory(directory)  # the checkpoint is there before anything names it
    link = directory / ".latest.new"
    link.unlink(missing_ok=True)
    link.symlink_to(place.name)
    link.replace(directory / "latest")
    sync_directory(directory)
    for old in saved_steps(directory)[:-keep] if keep else []:
        if old != best:
            shutil.rmtree(directory / f"step_{old}")
    return place


def saved_steps(directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints, ascending."""
    return sorted(map(step_of, directory.glob("step_*")))


def latest(directory: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    link = directory / "latest"
    return directory / link.readlink() if link.is_symlink() else None


def load(place: Path, device: torch.device) -> State:
    return torch.load(place / "state.pt", map_location=device, weights_only=True)


def restore(state: State, learner: Learner) -> None:
    """Put a checkpoint's state into a learner that was built from the same configuration.

    Raises:
        UsageError: the run had a momentum model and this configuration has none, or the other way round.
    """
    learner.policy.model.load_state_dict(state["model"])
    learner.optimizer.load_state_dict(state["optimizer"])
    if (learner.momentum is None) != (state["momentum"] is None):
        wanted = "no momentum model" if learner.momentum is None else "a momentum model"
        raise UsageError(f"resume: want a run with {wanted}, as these options need, got one that differs")
    if learner.momentum is not None and state["momentum"] is not None:
        decay = learner.momentum.decay
        learner.momentum.load_state_dict(state["momentum"])
        learner.momentum.decay = decay


def step_of(place: Path) -> int:
    return int(place.name.removeprefix("step_"))


def sync_directory(directory: Path) -> None:
    """Bring a directory's entries to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_directory(new: Path, place: Path) -> None:
    """Put a finished directory in another's place."""
    if place.exists():
        shutil.rmtree(place)
    new.rename(place)
    sync_directory(place.parent)
