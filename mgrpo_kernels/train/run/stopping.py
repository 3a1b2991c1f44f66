"""Ending a run when the user, or the machine, asks for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Abandoned(BaseException):  # like KeyboardInterrupt no error
    """Sampling was interrupted because the process is to end. No weight has changed."""


class Interrupt:
    """Whether the run has been asked to stop.

    Ctrl-C waits for the step. SIGTERM, after which a machine gives some seconds, does not wait for sampling, which is where nearly all of a
    step's time goes. A second request stops at once; under torchrun it does not, since a worker gets each signal twice there.
    """

    def __init__(self, notice: Callable[[], None]) -> None:
        self.asked, self._urgent, self._notice = False, False, notice

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.asked, self._urgent = True, self._urgent or number == signal.SIGTERM
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.default_int_handler)
        self._notice()

    def check(self) -> None:
        """Raise Abandoned if there is no time to continue sampling."""
        if self._urgent:
            raise Abandoned


@contextmanager
def interruptible(notice: Callable[[], None]) -> Iterator[Interrupt]:
    """Turn Ctrl-C and SIGTERM into a request, inside the block; `notice` reports it to the user."""
    interrupt = Interrupt(notice)
    before = {each: signal.signal(each, interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
