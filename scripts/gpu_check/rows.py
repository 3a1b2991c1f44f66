"""The log of a run: one line of JSON for each row that begins or finishes, appended at once.

Every line names its run (a test file, a benchmark file, the tuning) and holds one of

    collected  the names of the rows that a process is going to run
    begun      the name of a row, and its parameters if it is a test or a benchmark
    row        the name of a row, with its outcome: "passed", "failed" or "skipped", written by the process itself, or "crashed",
               "hung" or "cut off", written by its supervisor
    over       the name of a row whose teardown has finished, too
    end        how a process ended
    session    what pytest-benchmark says about the machine and the commit
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

LOG, RUN = "GPU_CHECK_LOG", "GPU_CHECK_RUN"  # environment variables: the file, and the name of the run
STICKY_EXIT = 86  # exit code of a process whose CUDA context is lost: a new process runs the rows that remain
LOST = ("crashed", "hung", "cut off")
_STICKY = re.compile(
    r"CUDA (driver )?error|\[CUDA\]|cudaError|CUDA_ERROR_|illegal memory access|device-side assert|misaligned address"
    r"|unspecified launch failure|illegal instruction|(CUBLAS|CUDNN|CUSOLVER)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|NOT_INITIALIZED)",
    re.IGNORECASE,
)


def append(path: Path, line: dict[str, Any]) -> None:
    """Append one line in a single write, so that the lines of several processes never mix."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        broken = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # a process was killed while it wrote
        os.write(descriptor, (("\n" if broken else "") + json.dumps(line, default=str) + "\n").encode())
    finally:
        os.close(descriptor)


def parse(text: bytes) -> list[dict[str, Any]]:
    """Return the lines that are complete."""
    lines = []
    for each in text.split(b"\n"):
        try:
            line = json.loads(each)
        except ValueError:  # empty, or cut off by a kill
            continue
        if isinstance(line, dict) and "run" in line:
            lines.append(line)
    return lines


@dataclasses.dataclass
class Run:
    """What the log says about one run."""

    name: str
    collected: list[str] = dataclasses.field(default_factory=list)
    begun: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # name -> parameters, in order
    rows: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    ends: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    session: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def not_finished(self) -> list[str]:
        """Rows that were collected or begun and have no outcome."""
        return [name for name in dict.fromkeys([*self.collected, *self.begun]) if name not in self.rows]

    def add(self, line: dict[str, Any]) -> None:
        """Take a line of this run into account."""
        if "collected" in line:
            self.collected = list(dict.fromkeys([*self.collected, *line["collected"]]))
        if "begun" in line:
            self.begun[line["begun"]] = line.get("params", {})
        if "session" in line:
            self.session = line["session"]
        if "end" in line:
            self.ends.append(line["end"])
        if "row" in line:
            self._merge({key: value for key, value in line.items() if key != "run"})

    def _merge(self, row: dict[str, Any]) -> None:
        """Keep the worst outcome of a row that has several lines (its call and its teardown), and all that was measured."""
        before = self.rows.get(row["row"])
        if before is not None:
            worse, other = sorted((before, row), key=lambda each: _severity(each["outcome"]), reverse=True)
            text = "\n".join(filter(None, [before.get("text"), row.get("text")]))
            row = {**other, **worse, "text": text}
        self.rows[row["row"]] = {"params": self.begun.get(row["row"], {}), **row}


def _severity(outcome: str) -> int:
    return {"passed": 0, "skipped": 0, "failed": 1}.get(outcome, 2)


def read(path: Path) -> dict[str, Run]:
    """Return the runs of a log by name, in the order in which they began; none where there is no log."""
    runs: dict[str, Run] = {}
    for line in parse(path.read_bytes()) if path.exists() else []:
        runs.setdefault(line["run"], Run(line["run"])).add(line)
    return runs


class Reader:
    """Reads what a run adds to a log, from now on."""

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = path, run
        self.offset = path.stat().st_size if path.exists() else 0

    def new(self) -> list[dict[str, Any]]:
        """Return the run's lines since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self.offset += len(text)
        return [line for line in parse(text) if line["run"] == self.run]


def is_sticky(text: str) -> bool:
    """Return True if a failed row has left this process without a usable GPU: every later row of the process would fail as well."""
    if _STICKY.search(text):
        return True
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:  # whatever it says, the device does not answer this process any more
        return True
    return False


def leave() -> None:
    """End a process whose CUDA context is lost, without the clean-up that would hang or crash on it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(STICKY_EXIT)


class Worker:
    """Writes the rows of a process that is not pytest. Rows that an earlier process of the run began are left out."""

    def __init__(self, path: Path | None = None, run: str | None = None) -> None:
        self.path, self.run = path or Path(os.environ[LOG]), run or os.environ[RUN]

    def write(self, **line: Any) -> None:
        """Append a line of this run."""
        append(self.path, {"run": self.run, **line})

    def so_far(self) -> Run:
        """Return what the log says about this run."""
        return read(self.path).get(self.run, Run(self.run))

    def collect(self, names: Iterable[str]) -> list[str]:
        """Announce the rows, and return those that remain to be run."""
        begun = self.so_far().begun
        remaining = [name for name in names if name not in begun]
        self.write(collected=remaining)
        return remaining

    def do(self, name: str, function: Callable[[], dict[str, Any]]) -> None:
        """Run a row, whose result is what `function` returns. A failure is an outcome, whatever was raised."""
        self.write(begun=name)
        try:
            result = function()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            self.write(row=name, outcome="failed", text=text[:6000], trace=traceback.format_exc()[-3000:])
            if is_sticky(text):
                leave()
        else:
            self.write(row=name, outcome="passed", **result)
        self.write(over=name)
