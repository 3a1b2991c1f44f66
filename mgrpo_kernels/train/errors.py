"""Errors that end a run with one line instead of a traceback."""

from __future__ import annotations


class UsageError(ValueError):
    """An option, a file or a directory is unusable. The message says how to fix it, and is shown without a traceback."""

    shown_elsewhere = False  # whether another rank has shown the message


class EngineError(RuntimeError):
    """The rollout engine failed or hung. The run ends with the reason, and its last checkpoint remains."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is damaged. Earlier checkpoints are unchanged."""


class OutputError(RuntimeError):
    """A file other than a checkpoint could not be written at the end of the run. Everything else has been saved."""


class FailedElsewhereError(RuntimeError):
    """Another rank has failed, and shows the reason."""
