"""math-verify in a process of its own, so that it can be killed: SymPy may hang, or ask for all the memory there is.

Both ends of the pipe are here: :class:`MathWorker` asks, and this file, run as a script, answers. It imports nothing of
the package, so the worker never loads torch. A question is a line of JSON ``[first, second, seconds]``; the answer is
``true`` or ``false``.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from functools import lru_cache

logger = logging.getLogger("mgrpo_kernels")

_READY = "ready"
_START_SECONDS = 120.0  # importing SymPy on a cold, busy machine
_MEMORY_BYTES = 4 << 30  # address space; an ordinary question needs 0.1 GiB


class MathWorker:
    """Asks math-verify whether two answers are equal, in one worker process that starts with the first question.

    A question that takes longer than `limit` seconds is given up: the worker is killed, the two answers count as
    different, and the next question starts a new worker. An answer too hard on its own is asked about once only.

    Args:
        limit: seconds for one question.
    """

    def __init__(self, limit: float = 3.0) -> None:
        self.limit = limit
        self._process: subprocess.Popen[str] | None = None
        self._hopeless: set[str] = set()  # answers that no question gets past
        self._lock = threading.Lock()
        atexit.register(self.close)

    def equal(self, first: str, second: str) -> bool:
        """Return math-verify's verdict; False, with a warning in the log, where it has none within the limit.

        Raises:
            ImportError: math-verify is not installed.
            RuntimeError: the worker process does not start.
        """
        with self._lock:
            if first in self._hopeless or second in self._hopeless:
                return False
            verdict = self._ask(first, second)
            if verdict is not None:
                return verdict
            logger.warning(
                "majority_vote: math-verify gave no verdict within %g s on %r and %r: they count as different",
                self.limit,
                first,
                second,
            )
            # Find out whose fault it was, or one bad answer would cost the whole limit once per rollout of its group.
            self._hopeless.update(answer for answer in (first, second) if self._ask(answer, "0") is None)
            return False

    def close(self) -> None:
        """Kill the worker process, if there is one. The next question starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # a question that it died before reading
                pipe.close()

    def _ask(self, first: str, second: str) -> bool | None:
        process = self._process
        if (
            process is None or process.poll() is not None
        ):  # none yet, died since, or is another process's (after a fork)
            self.close()
            process = self._process = self._start()
        reply = self._exchange(process, json.dumps([first, second, self.limit]), self.limit)
        return None if reply is None else bool(json.loads(reply))

    def _start(self) -> subprocess.Popen[str]:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(
                "equivalence='math': expected math-verify, for answers that are not plain numbers, got none installed; "
                'pip install "mgrpo_kernels[train]" has it, and equivalence="exact" needs none'
            )
        # -P: the script's own folder must not stand on sys.path, where it would shadow other packages' modules.
        process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._process = process
        if self._exchange(process, None, _START_SECONDS) != _READY:
            raise RuntimeError(
                f"equivalence='math': the math-verify worker did not start (exit status {process.returncode}); "
                "its own words are on stderr"
            )
        return process

    def _exchange(self, process: subprocess.Popen[str], line: str | None, seconds: float) -> str | None:
        """Write a line, if there is one, and return the reply; None, the worker killed, if it dies or is too slow."""
        assert process.stdin is not None
        assert process.stdout is not None
        reply = ""
        timer = threading.Timer(seconds, process.kill)  # readline then sees the end of the pipe
        timer.start()
        try:
            if line is not None:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            pass  # it died before it read the question: the same as no reply
        finally:
            timer.cancel()
            if not reply.endswith("\n"):  # interrupted (Ctrl-C), too: a late reply must not meet the next question
                self.close()
        return reply.strip() if reply.endswith("\n") else None


def _serve() -> None:
    """Answer questions from stdin until it ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not mix with the replies
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's; it closes the pipe in its own time
    if sys.platform != "win32":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(_MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are off: ours holds

    @lru_cache(maxsize=4096)
    def read(answer: str) -> object:
        return parse(f"${answer}$", parsing_timeout=None)

    def equal(first: str, second: str) -> bool:
        one, two = read(first), read(second)
        # verify() tells the gold answer from the other one, and may differ by direction: x > 2 and (2, oo).
        return bool(verify(one, two, timeout_seconds=None) or verify(two, one, timeout_seconds=None))

    equal("x + 1", "1 + x")  # the first question loads what the others need: not on its time
    print(_READY, file=replies, flush=True)
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    for line in sys.stdin:
        first, second, seconds = json.loads(line)
        if sys.platform != "win32":  # the asker kills us in time; should it be dead, this ends a hanging question
            signal.setitimer(signal.ITIMER_REAL, seconds + 1.0)
        print(json.dumps(equal(first, second)), file=replies, flush=True)
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_REAL, 0.0)


if __name__ == "__main__":
    _serve()
