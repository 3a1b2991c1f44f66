"""Checkpoints that are complete or not there, written by torch.distributed.checkpoint while training goes on.

A checkpoint is written beside its place, brought to the disk, and then renamed; ``latest`` is a link that is replaced in one go. So a
run killed at any moment leaves ``latest`` naming a complete checkpoint, or nothing. Random numbers, the order of the data and the learning
rate follow from the seed and the step, so a step number is all the state that they have.

``step_N/`` holds a file of tensors for each rank and ``run.json``: the step, and what size every file has, which is checked before
anything is read. Any number of ranks reads what any other number has written.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from mgrpo_kernels.train import parallel
from mgrpo_kernels.train.errors import CheckpointError, UsageError
from mgrpo_kernels.train.step import Learner

FACTS = "run.json"
# One process is a choice here, not an oversight.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


def state_of(learner: Learner) -> dict[str, Tensor]:
    """Return every tensor that training changes, by name: the learner's own, into which a checkpoint is read back.

    The optimizer's that are not there yet are made, as AdamW makes them. With LoRA the frozen weights are left out.
    """
    model, optimizer = learner.policy.model, learner.optimizer
    everything = learner.policy.adapter is None
    parameters = {
        name: each for name, each in model.named_parameters() if everything or each.requires_grad
    }  # tied ones once
    buffers = dict(model.named_buffers())
    values = model.state_dict()
    state = {f"model.{name}": values[name] for name in values if name in parameters or name in buffers}
    fused = {id(each): group.get("fused") for group in optimizer.param_groups for each in group["params"]}
    for name, parameter in parameters.items():
        if id(parameter) not in fused:
            continue  # frozen
        own = optimizer.state[parameter]
        if not own:
            device = parameter.device if fused[id(parameter)] else "cpu"
            own["step"] = torch.tensor(0.0, device=device)
            own.update({key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")})
        state.update({f"optimizer.{name}.{key}": value.detach() for key, value in own.items()})
    if learner.momentum is not None:
        state.update({f"momentum.{name}": value for name, value in learner.momentum.ema.items()})
    return state


class Writer:
    """Writes a run's checkpoints, one at a time.

    Args:
        directory: where they go.
        keep: how many are kept, the newest; 0: all.
        background: go on as soon as the weights are copied; the copy is written meanwhile.
        write_line: prints a message.
    """

    def __init__(
        self, directory: Path, keep: int, *, background: bool = False, write_line: Callable[[str], None] = print
    ) -> None:
        self.directory, self.keep, self.background, self.write_line = directory, keep, background, write_line
        self._written: tuple[int, Future[Path]] | None = None
        # Ranks agree in the background too, which must not mix with what they say to each other meanwhile.
        self._group = dist.new_group(backend="gloo") if parallel.world() > 1 else None

    def save(
        self,
        learner: Learner,
        step: int,
        metrics_bytes: int,
        samples_bytes: int,
        best: int | None = None,
        *,
        pending: Any = None,
        wait: bool = False,
    ) -> Path:
        """Write ``directory/step_N`` and let ``latest`` name it; return its path. Every rank must call.

        Then delete all but the newest and that of the step `best`. In the background, a failure is told at the next call or by
        :meth:`report_failure`, and training goes on.

        Args:
            learner: what is saved.
            step: N.
            metrics_bytes: the size of metrics.jsonl at that step.
            samples_bytes: likewise.
            best: a step.
            pending: what JSON holds of a step whose evaluation is still to come.
            wait: for the checkpoint to be complete.

        Raises:
            CheckpointError: it could not be written, and the call waits.
        """
        self.settle()
        path, new = self.directory / f"step_{step}", self.directory / f".step_{step}.new"
        if parallel.from_first(latest(self.directory) == path):
            return path  # the very step that the run was resumed from
        facts = {
            "step": step, "metrics_bytes": metrics_bytes, "samples_bytes": samples_bytes, "pending": pending, "ranks": parallel.world(),
            "momentum_updates": None if learner.momentum is None else learner.momentum.updates,
        }  # fmt: skip
        written: Future[Path] = Future()

        def finish(saved: Future[Any]) -> None:
            try:
                saved.result()
                if parallel.is_first():
                    self._complete(new, path, facts, best)
                written.set_result(path)
            except BaseException as error:
                if parallel.is_first():
                    shutil.rmtree(new, ignore_errors=True)  # what it takes of a full disk
                last = latest(self.directory)
                stands = "there is none before it" if last is None else f"{last.name} stands"
                failure = CheckpointError(f"checkpoint: step {step} could not be written to {path}: {cause(error)}; {stands}")  # fmt: skip
                failure.__cause__ = error
                written.set_exception(failure)

        options: dict[str, Any] = {"process_group": self._group, "no_dist": self._group is None}
        try:
            with parallel.together():
                if parallel.is_first():
                    self._clear(step, new)
            state, writer = state_of(learner), dcp.FileSystemWriter(new, sync_files=True)
            if self.background and not wait:
                saving: Any = dcp.async_save(state, storage_writer=writer, **options)
                saving.add_done_callback(finish)
            else:
                dcp.save(state, storage_writer=writer, **options)
                finish(_done(None))
        except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
            finish(_done(error))
        self._written = (step, written)
        if wait:
            self.settle(fatal=True)
        return path

    def report_failure(self) -> None:
        """Say so where a save in the background has failed. Any rank may call, at any time."""
        if self._written is not None and self._written[1].done():
            _, written = self._written
            error = written.exception()
            self._written = None
            if error is not None and parallel.is_first():
                self.write_line(f"warning: {error}. Training goes on; the next checkpoint is tried again")

    def settle(self, *, fatal: bool = False) -> None:
        """Wait for a save in the background. Every rank must call.

        Raises:
            CheckpointError: it failed, and this is `fatal`; else that is only told.
        """
        if self._written is not None and fatal:
            _, written = self._written
            self._written = None
            with parallel.together():
                written.result()
        elif self._written is not None:
            self._written[1].exception()  # waits
            self.report_failure()

    def _clear(self, step: int, new: Path) -> None:
        """Remove what a run has left that was killed while it saved, and make room for the new one."""
        for leftover in [
            *self.directory.glob(".step_*.new"),
            *(each for each in self.directory.glob("step_*") if step_of(each) >= step),
        ]:
            shutil.rmtree(leftover)
        new.mkdir(parents=True)

    def _complete(self, new: Path, path: Path, facts: dict[str, Any], best: int | None) -> None:
        """Put a written checkpoint in its place, and delete old ones."""
        sizes = {each.name: each.stat().st_size for each in sorted(new.iterdir())}
        with (new / FACTS).open("w", encoding="utf-8") as file:
            json.dump({**facts, "files": sizes}, file)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(new)
        new.rename(path)
        sync_directory(self.directory)  # the checkpoint is there before anything names it
        link = self.directory / ".latest.new"
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        link.replace(self.directory / "latest")
        sync_directory(self.directory)
        for old in saved_steps(self.directory)[: -self.keep] if self.keep else []:
            if old != best:
                shutil.rmtree(self.directory / f"step_{old}")


def save(
    directory: Path,
    learner: Learner,
    step: int,
    metrics_bytes: int,
    samples_bytes: int,
    keep: int,
    best: int | None = None,
) -> Path:
    """Write a checkpoint, as :meth:`Writer.save` does, and wait for it."""
    return Writer(directory, keep).save(learner, step, metrics_bytes, samples_bytes, best, wait=True)


def saved_steps(directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints, ascending."""
    return sorted(map(step_of, directory.glob("step_*")))


def latest(directory: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    link = directory / "latest"
    return directory / link.readlink() if link.is_symlink() else None


def load(path: Path) -> dict[str, Any]:
    """Return what a checkpoint knows besides its tensors: step, metrics_bytes, samples_bytes, pending, momentum_updates, ranks, path.

    Raises:
        CheckpointError: a file is missing, or not as long as it was when it was written.
    """
    try:
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        for name, size in facts["files"].items():
            found = (path / name).stat().st_size
            if found != size:
                raise CheckpointError(f"checkpoint: expected {path / name} of {size} bytes, got {found}")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint: expected a complete one in {path}, got {cause(error)}") from error
    return {**facts, "path": path}


def restore(facts: dict[str, Any], learner: Learner) -> None:
    """Put a checkpoint's tensors into a learner that was built from the same configuration. Every rank must call.

    Raises:
        UsageError: the run had a momentum model and this configuration has none, or the other way round; other weights.
        CheckpointError: it cannot be read.
    """
    if (learner.momentum is None) != (facts["momentum_updates"] is None):
        wanted = "no momentum model" if learner.momentum is None else "a momentum model"
        raise UsageError(f"resume: expected a run with {wanted}, as these options need, got one that differs")
    state = state_of(learner)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    with reading(facts["path"]):
        there = sizes(facts["path"])
    if shapes != there:
        differing = next(each for each in sorted({*shapes, *there}) if shapes.get(each) != there.get(each))
        wanted, got = (str(each.get(differing, "nowhere")) for each in (shapes, there))
        raise UsageError(f"resume: expected a checkpoint of this model, {differing} {wanted}, got {got}")
    with reading(facts["path"]):
        dcp.load(state, storage_reader=dcp.FileSystemReader(facts["path"]), no_dist=parallel.world() == 1)
    if learner.momentum is not None:
        learner.momentum.updates = facts["momentum_updates"]


def resume(directory: Path, learner: Learner, write_line: Callable[[str], None]) -> dict[str, Any] | None:
    """Restore the newest checkpoint that can be read; return what it knows, or None where there is no checkpoint.

    Raises:
        CheckpointError: there are some, and none can be read.
    """
    newest = latest(directory)
    steps = [] if newest is None else [each for each in saved_steps(directory) if each <= step_of(newest)]
    paths = parallel.from_first([directory / f"step_{step}" for step in reversed(steps)])
    for path in paths:
        try:
            with parallel.together():
                facts = load(path)
            restore(facts, learner)
            return facts
        except (CheckpointError, RuntimeError) as error:
            write_line(f"warning: {error}. It is left out")
    if paths:
        raise CheckpointError(f"checkpoint: expected one in {directory} that can be read, got {len(paths)} that cannot")
    return None


def read(path: Path, prefix: str) -> dict[str, Tensor]:
    """Return the whole tensors of a checkpoint whose name begins with `prefix`, without it: "model." or "momentum.".

    Raises:
        CheckpointError: it cannot be read.
    """
    with reading(path):
        metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        state = {
            name: torch.empty(each.size, dtype=each.properties.dtype)
            for name, each in metadata.items()
            if name.startswith(prefix) and isinstance(each, dcp.metadata.TensorStorageMetadata)
        }
        dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def sizes(path: Path) -> dict[str, torch.Size]:
    """Return the shapes of a checkpoint's tensors by name."""
    found = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return {name: each.size for name, each in found.items() if isinstance(each, dcp.metadata.TensorStorageMetadata)}


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever torch says of a damaged file into a CheckpointError."""
    try:
        yield
    except (Exception, dcp.api.CheckpointException) as error:  # torch's is no Exception
        raise CheckpointError(f"checkpoint: expected a readable one in {path}, got {cause(error)}") from error


def cause(error: BaseException) -> str:
    """Return what went wrong on the first rank that failed, in a line."""
    if isinstance(error, dcp.api.CheckpointException):
        number, (inner, _) = next(iter(error.failures.items()))
        return f"rank {number}: {cause(inner)}" if parallel.world() > 1 else cause(inner)
    root: BaseException | None = error
    while root is not None and not isinstance(root, OSError):  # torch tells of its own surprise at what the disk said
        root = root.__cause__ or root.__context__
    root = error if root is None else root
    return f"{type(root).__name__}: {root}".splitlines()[0]


def _done(error: BaseException | None) -> Future[Any]:
    future: Future[Any] = Future()
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
    return future


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def sync_directory(directory: Path) -> None:
    """Bring a directory's entries to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_directory(new: Path, path: Path) -> None:
    """Put a finished directory in another's place."""
    if path.exists():
        shutil.rmtree(path)
    new.rename(path)
    sync_directory(path.parent)
