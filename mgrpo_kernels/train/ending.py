"""How a command ends: which errors end it with one line in place of a traceback, and with what exit status."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from mgrpo_kernels.train.errors import CheckpointError, EngineError, FailedElsewhereError, OutputError, UsageError
from mgrpo_kernels.train.text import print_line

RESUME = "--resume continues from the last checkpoint"


def exit_status(
    error: BaseException, hint: str = f"; {RESUME}", spell: Callable[[str], str] = lambda text: text
) -> int | None:
    """Print an error that a user can understand, and return the command's exit status; return None for any other error.

    `hint` follows the message where the run can be resumed. `spell` spells the option that the error is about.
    """
    if isinstance(error, FailedElsewhereError) or (isinstance(error, UsageError) and error.shown_elsewhere):
        return 2 if isinstance(error, UsageError) else 1
    text, status = str(error), 1
    if isinstance(error, UsageError):
        status = 2
    elif isinstance(error, FloatingPointError):
        text = f"{text}. Nothing was saved after that{hint}"
    elif is_out_of_memory(error):
        text = (
            f"out of memory: {first_line(error)}. Lower --tokens-per-microbatch, --rollouts or --max-response-tokens, or see "
            f"--dry-run for what takes the memory{hint}"
        )
    elif is_lost_contact(error):
        text = (
            f"lost contact with another rank: {first_line(error)}. It ended, hangs, or took longer than --rank-timeout; its own output, or "
            f"torchrun's summary, says which{hint}"
        )
    elif isinstance(error, OSError):
        text = f"{type(error).__name__}: {text}{hint}"
    elif isinstance(error, KeyboardInterrupt):
        print_line(f"interrupted{hint}, or from the start if there is none" if hint else "interrupted", error=True)
        return 130
    elif not isinstance(error, (CheckpointError, EngineError, OutputError)):
        return None
    print_line(f"error: {spell(text)}", error=True)
    return status


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory was refused, by Python, by a GPU (torch.OutOfMemoryError) or by PyTorch on a CPU, which has no class for it."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def is_lost_contact(error: BaseException) -> bool:
    """Return whether a collective failed because another rank did not take part. Gloo raises plain RuntimeErrors for that."""
    return isinstance(error, RuntimeError) and (
        type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError") or "/gloo/" in str(error)
    )


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def leave(status: int) -> NoReturn:
    """End this process with an exit status; as one of several ranks, without taking the interpreter apart.

    FSDP2 holds its process groups to the end, in spite of destroy_process_group, and with them gloo's threads. One that lets go of a
    tensor of the last collective while the interpreter is taken apart aborts the process (pytorch #179291), and a run that ended well
    looks like a crash.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
