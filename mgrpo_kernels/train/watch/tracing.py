"""Traces of steps by torch.profiler, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class Trace:
    """Writes a trace of some steps to ``trace.json`` in `directory`; every rank N but the first writes ``trace_rankN.json``.

    Args:
        steps: steps to trace; may be empty.
        directory: directory of the file.
        rank: rank of this process.
        write_line: prints the path of the file.
    """

    def __init__(self, steps: range, directory: Path, rank: int, write_line: Callable[[str], None]) -> None:
        self.steps = steps
        self.path = directory / ("trace.json" if rank == 0 else f"trace_rank{rank}.json")
        self._write_line = write_line
        self._profiler: profile | None = None

    @contextmanager
    def during(self, step: int) -> Iterator[None]:
        """Trace the block if `step` is one of the steps. A run that is resumed between them is traced from there on."""
        if step in self.steps and self._profiler is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profiler = profile(activities=activities, record_shapes=True)
            self._profiler.start()
        yield
        if step >= self.steps.stop - 1:
            self.close()

    def close(self) -> None:
        """Write the trace, unless that has been done or nothing has been traced."""
        if self._profiler is not None:
            self._profiler.stop()
            profiler, self._profiler = self._profiler, None
            try:
                profiler.export_chrome_trace(str(self.path))
            except (OSError, RuntimeError) as error:  # torch's writer raises the second for a full disk
                self._write_line(f"warning: {self.path} could not be written: {error}")
                return
            self._write_line(f"profile: {self.path}")
