"""metrics.jsonl, samples.jsonl and the like: a JSON object in each line, ended by a line feed alone."""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.text import print_line
from mgrpo_kernels.train.watch.metrics import plain


def parse_lines(content: bytes) -> list[dict[str, Any]]:
    """Return the objects in the content of a JSONL file. A last line that is not complete, of a run that is being written, is left out.

    Only a line feed ends a line. ``str.splitlines`` would also split at U+2028, U+2029, U+0085 and others, which JSON keeps as they are.
    """
    *lines, last = content.split(b"\n")
    with contextlib.suppress(ValueError):  # no part of an object is one
        return [json.loads(line) for line in [*lines, *([last] if last else [])]]
    return [json.loads(line) for line in lines]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a JSONL file."""
    return parse_lines(path.read_bytes())


def as_line(values: Mapping[str, Any]) -> bytes:
    """Return an object as a line of a JSONL file, with its line feed."""
    text = json.dumps({key: plain(value) for key, value in values.items()}, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


class Lines:
    """A JSONL file that grows a line at a time, and can be cut back to an earlier size.

    Lines that cannot be written, to a full disk for instance, are kept in memory and tried again with every later line.

    Args:
        path: of the file.
        size: the file is cut back to its first `size` bytes. What is cut off is kept beside it, as ``NAME.cut``.
        unwritten: lines, as text, that follow those on the disk: an earlier process could not write them.
        warn: receives a message when lines cannot be written, and when they are written at last.

    Raises:
        UsageError: the file is shorter than `size`, or cannot be opened, or what is cut off cannot be kept.
    """

    def __init__(
        self, path: Path, size: int, *, unwritten: Iterable[str] = (), warn: Callable[[str], None] = print_line
    ) -> None:
        self.path, self._size, self._warn = path, size, warn
        self._waiting = deque(line.encode() + b"\n" for line in unwritten)
        self._torn = self._failing = False
        check_size(path, size)
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            rest = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, size)
            if rest:
                path.with_name(path.name + ".cut").write_bytes(rest)
                os.ftruncate(self._descriptor, size)
        except OSError as error:
            raise UsageError(f"output: expected a file that can be written, got {path}: {error}") from error
        self._write_waiting()

    def write(self, values: Mapping[str, Any]) -> None:
        self._waiting.append(as_line(values))
        self._write_waiting()

    def _write_waiting(self) -> None:
        """Write the lines that wait, and report the first failure of a series and its end."""
        try:
            while self._waiting:
                self._write_whole(self._waiting[0])
                self._size += len(self._waiting.popleft())
        except OSError as error:
            with contextlib.suppress(OSError):  # else before the next line
                self._cut_torn()
            if not self._failing:
                self._warn(
                    f"warning: {self.path} could not be written: {error.strerror or error}. "
                    "Its lines are kept in memory and tried again with every step"
                )
            self._failing = True
            return
        if self._failing:
            self._warn(f"{self.path} could be written again, and no line of it is missing")
        self._failing = False

    def _write_whole(self, line: bytes) -> None:
        self._cut_torn()
        self._torn = True
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        self._torn = False

    def _cut_torn(self) -> None:
        """Remove the part of a line that was written before its write failed, so that a reader finds whole lines."""
        if self._torn:
            os.ftruncate(self._descriptor, self._size)
            self._torn = False

    @property
    def unwritten(self) -> list[str]:
        """The lines that could not be written so far."""
        return [line[:-1].decode() for line in self._waiting]

    def sync(self) -> int:
        """Bring the lines to the disk; return the size of those that have been written, in bytes."""
        self._write_waiting()
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._warn(f"warning: {self.path} could not be brought to the disk: {error.strerror or error}")
        return self._size

    def close(self) -> None:
        self._write_waiting()
        os.close(self._descriptor)


def check_size(path: Path, size: int) -> None:
    """Raise UsageError for a file with fewer bytes than a checkpoint refers to."""
    found = path.stat().st_size if path.exists() else 0
    if found < size:
        raise UsageError(
            f"{path}: expected at least the {size} bytes that the checkpoint knows of, got {found}: restore the file, for instance "
            "from where the run was copied"
        )
