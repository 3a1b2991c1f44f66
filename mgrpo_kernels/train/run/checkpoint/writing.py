"""Writing checkpoints, in the background or not."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from mgrpo_kernels.train import parallel
from mgrpo_kernels.train.errors import CheckpointError
from mgrpo_kernels.train.run import files
from mgrpo_kernels.train.run.checkpoint.reading import (
    FACTS,
    LATEST,
    NAME,
    NONE_YET,
    candidates,
    cause,
    latest,
    saved_steps,
    step_of,
)
from mgrpo_kernels.train.run.checkpoint.state import state_of
from mgrpo_kernels.train.step import Learner

# One process is a choice here, not an oversight.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


class Saving(NamedTuple):
    """A checkpoint that is being written."""

    new: Path  # where its files are until it is complete
    path: Path
    facts: dict[str, Any]
    protected: Collection[int | None]  # steps whose checkpoints are kept in any case
    done: Future[Path]


class Writer:
    """Writes a run's checkpoints, one at a time.

    Args:
        directory: where they go.
        keep: how many are kept, the newest; 0: all.
        background: continue as soon as the weights are copied; the copy is written meanwhile.
        write_line: prints a message.
        newest: the checkpoint from which the run was resumed.
        fingerprints: of the data, the base model and its tokenizer, entered in every checkpoint.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        *,
        background: bool = False,
        write_line: Callable[[str], None] = print,
        newest: Path | None = None,
        fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        self.directory, self.keep, self.background, self.write_line = directory, keep, background, write_line
        self.newest, self.fingerprints = newest, dict(fingerprints or {})
        self._saving: Saving | None = None
        self._complaints: list[str] = []  # of the clean-up, which a thread may do
        self._reported: set[str] = set()
        # Ranks agree in the background too, which must not mix with what they exchange meanwhile.
        self._group = dist.new_group(backend="gloo") if parallel.world() > 1 else None

    def save(
        self,
        learner: Learner,
        step: int,
        metrics_bytes: int,
        samples_bytes: int,
        best: int | None = None,
        *,
        proven: int | None = None,
        unwritten: Mapping[str, list[str]] | None = None,
        pending: Any = None,
        wait: bool = False,
    ) -> Path:
        """Write ``directory/step_N`` and let ``latest`` name it; return its path. Every rank must call.

        Then delete all but the newest and those of the steps `best` and `proven`. In the background, a failure is reported at the next
        call or by :meth:`report_failure`, and training continues.

        Args:
            learner: what is saved.
            step: N.
            metrics_bytes: the size of metrics.jsonl at that step.
            samples_bytes: likewise.
            best: a step.
            proven: a step.
            unwritten: lines of these files that could not be written by then.
            pending: what JSON holds of a step whose evaluation is still to come.
            wait: for the checkpoint to be complete.

        Raises:
            CheckpointError: it could not be written, and the call waits.
        """
        self.settle()
        path = self.directory / f"step_{step}"
        if parallel.from_first(self.newest == path):
            return path  # the very step that the run was resumed from
        facts = {
            "step": step,
            "metrics_bytes": metrics_bytes,
            "samples_bytes": samples_bytes,
            "unwritten": dict(unwritten or {}),
            "pending": pending,
            "ranks": parallel.world(),
            "fingerprints": self.fingerprints,
            "momentum_updates": None if learner.momentum is None else learner.momentum.updates,
            "teacher": None if learner.momentum is None else learner.momentum.progress(),
        }
        new = parallel.from_first(self._free_name(step))
        self._saving = saving = Saving(new, path, facts, (best, proven), Future())
        self._start(learner, saving, background=self.background and not wait)
        if wait:
            self.settle(fatal=True)
        return path

    def _start(self, learner: Learner, saving: Saving, *, background: bool) -> None:
        options: dict[str, Any] = {"process_group": self._group, "no_dist": self._group is None}
        try:
            with parallel.together():
                if parallel.is_first():
                    saving.new.mkdir(parents=True)
            state, writer = state_of(learner), dcp.FileSystemWriter(saving.new, sync_files=True)
            if background:
                written: Any = dcp.async_save(state, storage_writer=writer, **options)
                written.add_done_callback(lambda future: self._finish(saving, future.exception()))
            else:
                dcp.save(state, storage_writer=writer, **options)
                self._finish(saving, None)
        except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
            self._finish(saving, error)

    def _finish(self, saving: Saving, error: BaseException | None) -> None:
        """Complete a checkpoint whose tensors are written, or remove what is left of one that failed."""
        try:
            if error is not None:
                raise error
            if parallel.is_first():
                self._complete(saving)
                self.newest = saving.path
                try:
                    self._clean_up(saving)
                except (OSError, CheckpointError) as trouble:  # the checkpoint is complete all the same
                    self._complaints.append(f"checkpoint: old ones could not be deleted: {files.reason(trouble)}")
            saving.done.set_result(saving.path)
        except BaseException as failure:
            rest = ""
            if parallel.is_first():
                files.discard(saving.new)  # which may be most of a full disk
            with contextlib.suppress(CheckpointError):
                last = latest(self.directory)
                rest = "; there is none before it" if last is None else f"; {last.name} is complete"
            text = f"checkpoint: step {saving.facts['step']} could not be written to {saving.path}: {cause(failure)}"
            reported = CheckpointError(text + rest)
            reported.__cause__ = failure
            saving.done.set_exception(reported)

    def _complete(self, saving: Saving) -> None:
        """Add run.json, and put the checkpoint in its place."""
        sizes = {each.name: each.stat().st_size for each in sorted(saving.new.iterdir())}
        with (saving.new / FACTS).open("w", encoding="utf-8") as file:
            json.dump({**saving.facts, "files": sizes}, file)
            file.flush()
            os.fsync(file.fileno())
        files.sync_directory(saving.new)
        files.put(saving.new, saving.path)
        files.sync_directory(self.directory)

    def _clean_up(self, saving: Saving) -> None:
        """Let ``latest`` name the new checkpoint, and delete what is no longer needed. The checkpoint is complete whatever fails here."""
        link = self.directory / f".{LATEST}.new"
        try:
            if files.is_directory(self.directory / LATEST) and not (self.directory / LATEST / FACTS).exists():
                raise IsADirectoryError("it is a directory, and not a copy of a checkpoint")
            link.unlink(missing_ok=True)
            link.symlink_to(saving.path.name)
            files.put(link, self.directory / LATEST)
            (self.directory / NONE_YET).unlink(missing_ok=True)
            files.sync_directory(self.directory)
        except OSError as error:
            self._complaints.append(
                f"checkpoint: {self.directory / LATEST} could not be set to {saving.path.name}: {files.reason(error)}. "
                "--resume does not need it"
            )
        # A newer one is there only if it could not be read when the run was resumed.
        newer = [each for each in candidates(self.directory) if (step_of(each) or 0) > saving.facts["step"]]
        for leftover in [*self._leftovers(), *newer]:
            self._delete(leftover)
        self.prune(saving.protected)

    def prune(self, protected: Collection[int | None]) -> None:
        """Delete all complete checkpoints but the newest, as many as are kept, and the protected ones, on the rank that writes."""
        if not parallel.is_first():
            return
        for old in saved_steps(self.directory)[: -self.keep] if self.keep else []:
            if old not in protected:
                self._delete(self.directory / f"step_{old}")

    def _leftovers(self) -> list[Path]:
        """Return the parts of checkpoints that killed runs and failed deletions have left."""
        return [
            each
            for each in self.directory.glob(".step_*")
            if each.suffix in (".new", ".old") and NAME.fullmatch(each.name[1:].partition(".")[0])
        ]

    def _free_name(self, step: int) -> Path:
        """Return where a checkpoint is written until it is complete, which does not exist yet."""
        names = (self.directory / f".step_{step}{f'.{n}' if n else ''}.new" for n in range(1000))
        return next(each for each in names if not parallel.is_first() or files.discard(each))

    def _delete(self, path: Path) -> None:
        try:
            shutil.rmtree(path)
        except OSError as error:
            self._complaints.append(f"checkpoint: {path} could not be deleted: {files.reason(error)}")

    @property
    def is_idle(self) -> bool:
        """Whether no checkpoint is being written."""
        return self._saving is None or self._saving.done.done()

    def report_failure(self) -> None:
        """Print a warning if a save in the background or a clean-up has failed. Any rank may call, at any time."""
        while self._complaints:
            text = self._complaints.pop(0)
            if text not in self._reported:  # it is tried again after every checkpoint
                self._reported.add(text)
                self.write_line(f"warning: {text}")
        if self._saving is not None and self._saving.done.done():
            error, self._saving = self._saving.done.exception(), None
            if error is not None and parallel.is_first():
                self.write_line(f"warning: {error}. Training continues; the next checkpoint is tried again")

    def settle(self, *, fatal: bool = False) -> None:
        """Wait for a save in the background. Every rank must call.

        Raises:
            CheckpointError: it failed and `fatal` is set; otherwise a failure is only reported.
        """
        if self._saving is not None and fatal:
            done, self._saving = self._saving.done, None
            with parallel.together():
                done.result()
        elif self._saving is not None:
            self._saving.done.exception()  # waits
        self.report_failure()


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
