"""Runs processes that write rows, and loses no more than the row that went wrong.

A row that writes nothing for too long is killed and recorded as hung; one whose process ends under it is recorded as crashed. Either way,
and after an error that leaves the process without its GPU, a new process of the same command runs the rows that remain.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from gpu_check import rows

START_SECONDS = 90.0  # until a process has collected its rows: importing torch on a cold disk takes most of it
POLL_SECONDS = 0.05
LEAST_SECONDS = 5.0  # with less left, no further process is started


class Finished(NamedTuple):
    """A run that is over."""

    reason: str  # why rows remain that were not run; empty where none do
    seconds: float
    processes: int
    text: str  # the end of what the last process printed
    cannot_start: bool = False  # a process ended before its first row, without being killed


class _Ended(NamedTuple):
    """One process that is over."""

    how: str  # "finished", "restart", "crashed", "hung" or "cut off"
    code: int
    progressed: bool  # it began a row
    text: str


def describe(code: int) -> str:
    """Return an exit code in words."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    return next((line.strip()[:160] for line in reversed(text.splitlines()) if line.strip()), "it printed nothing")


class Supervisor:
    """Starts and watches the processes of a check, several at a time if several threads call `run`."""

    def __init__(
        self,
        log: Path,
        folder: Path,
        *,
        tick: Callable[[], None] = lambda: None,
        record: Callable[[str, str], None] | None = None,
    ) -> None:
        self.log, self.folder, self.tick = log, folder, tick
        self.record = record or (lambda title, text: None)  # what each process printed
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopping = False

    def stop(self) -> None:
        """Kill every process, and record no more."""
        self.stopping = True
        for process in list(self.running):
            _kill(process, wait=False)

    def run(
        self,
        run: str,
        command: Sequence[object],
        *,
        seconds: float,
        row_seconds: float,
        start_seconds: float = START_SECONDS,
        environment: dict[str, str] | None = None,
    ) -> Finished:
        """Run `command` (arguments of this interpreter) until its rows are done or `seconds` are over."""
        begin = time.monotonic()
        deadline, processes, reason, text, cannot_start = begin + seconds, 0, "", "", False
        settings = {**os.environ, **(environment or {}), rows.LOG: str(self.log), rows.RUN: run}
        while True:
            processes += 1
            ended = self._one(run, command, deadline, row_seconds, start_seconds, settings)
            text = ended.text
            if self.stopping or ended.how == "cut off":
                reason = f"no time left after {time.monotonic() - begin:.0f} s"
                break
            if ended.how == "finished":
                break
            if not ended.progressed:  # another process would do the same
                cannot_start = ended.how != "hung"
                ending = describe(ended.code) if cannot_start else f"hung for {start_seconds:.0f} s"
                reason = f"the process {ending} before its first row: {last_line(text)}"
                break
            if deadline - time.monotonic() < LEAST_SECONDS:
                reason = "no time left for another process"
                break
        if not self.stopping and reason:
            rows.append(self.log, {"run": run, "end": {"reason": reason, "text": text[-2000:]}})
        return Finished(reason, round(time.monotonic() - begin, 1), processes, text, cannot_start)

    def _one(
        self,
        run: str,
        command: Sequence[object],
        deadline: float,
        row_seconds: float,
        start_seconds: float,
        settings: dict[str, str],
    ) -> _Ended:
        """Run one process to its end, and record the row that it was in."""
        reader = rows.Reader(self.log, run)
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=self.folder,
                env=settings,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.running.add(process)
            begin = last = time.monotonic()
            how, row, collected, begun = "", None, None, set()
            try:
                if self.stopping:  # meanwhile
                    _kill(process)
                while True:
                    code = process.poll()  # before the lines are read: none is missed of a process that has ended
                    for line in reader.new():
                        last = time.monotonic()
                        if "collected" in line:
                            collected = set(line["collected"])
                        elif "begun" in line:
                            row = line["begun"]
                            begun.add(row)
                        elif "over" in line:
                            row = None
                    now = time.monotonic()
                    if code is not None:
                        break
                    if now > deadline:
                        how = "cut off"
                    elif now - last > (start_seconds if collected is None else row_seconds):
                        how = "hung"
                    if how:
                        break
                    self.tick()
                    time.sleep(POLL_SECONDS)
            finally:
                _kill(process)  # its own children as well
                self.running.discard(process)
            text = _read(output)
        code = process.returncode if process.returncode is not None else 0
        done = row is None and collected is not None and begun >= collected and how != "cut off"
        if done and (begun or code in (0, 5)):  # 5: pytest selected no row
            how = "finished"  # whatever its exit was
        elif not how:
            how = "restart" if code == rows.STICKY_EXIT else "crashed"
        if not self.stopping:
            if row is not None and how != "restart":
                self._record_row(run, row, how, code, now - last, text)
            self.record(f"{run}: {how}, {describe(code)}, {now - begin:.1f} s", text)
        return _Ended(how, code, bool(begun), text)

    def _record_row(self, run: str, row: str, how: str, code: int, idle: float, text: str) -> None:
        """Give the row that was open an outcome."""
        words = {
            "hung": f"hung: it was killed after {idle:.0f} s without a result",
            "cut off": "cut off: the time of its file was over",
            "crashed": f"crashed: its process {describe(code)}: {last_line(text)}",
        }
        rows.append(self.log, {"run": run, "row": row, "outcome": how, "text": words[how], "printed": text[-9000:]})


def _kill(process: subprocess.Popen[bytes], wait: bool = True) -> None:
    """Kill a process and its children; give up on one that the driver does not let go."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if wait:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)


def _read(output: IO[bytes]) -> str:
    output.seek(0, os.SEEK_END)
    output.seek(max(0, output.tell() - 200_000))
    return output.read().decode(errors="replace")
