"""log.txt: everything that a run prints, from its first line on, also of the time before its directory exists."""

from __future__ import annotations

import logging
import sys
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType
from typing import Self

from mgrpo_kernels.train.text import PRINTED

LOG = "log.txt"
LOGGER = logging.getLogger("mgrpo_kernels")
"""Receives what the user should know of the data and the model."""


class LogFile(logging.FileHandler):
    """Appends lines to a file. A disk that is full costs lines, and not the run."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name that logging calls
        """Leave the line out."""


class Record:
    """Collects what is printed inside the block, and writes it once :meth:`open` has been called."""

    def __init__(self) -> None:
        self._waiting = MemoryHandler(10_000, flushLevel=100, flushOnClose=False)
        # A logger with a handler no longer uses that of last resort, which writes warnings to standard error.
        self._stderr = None if LOGGER.handlers or logging.getLogger().handlers else logging.StreamHandler(sys.stderr)

    def __enter__(self) -> Self:
        for logger in (PRINTED, LOGGER):
            logger.addHandler(self._waiting)
        if self._stderr is not None:
            self._stderr.setLevel(logging.WARNING)
            LOGGER.addHandler(self._stderr)
        return self

    def open(self, directory: Path) -> None:
        """Write what has been printed, and from now on each line at once, to log.txt in the directory."""
        if self._waiting.target is None:
            file = LogFile(directory / LOG, encoding="utf-8", errors="backslashreplace")
            file.setFormatter(logging.Formatter("%(message)s"))
            self._waiting.setTarget(file)
            self._waiting.flush()
            self._waiting.flushLevel = logging.NOTSET

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for logger in (PRINTED, LOGGER):
            logger.removeHandler(self._waiting)
        if self._stderr is not None:
            LOGGER.removeHandler(self._stderr)
        if self._waiting.target is not None:
            self._waiting.target.close()
        self._waiting.close()
