"""SymPy in a process of its own, limited in CPU time and memory, so that it can be killed.

Both ends of the pipe are here: :class:`MathWorker` asks, and this file, run as a script, answers. It imports nothing of
the package, so the worker never loads torch. A question is a line of JSON ``[formula, cpu_seconds]``, the formula in LaTeX; the answer is a
closed form in LaTeX as a JSON string, or ``null`` where there is none.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time

logger = logging.getLogger("mgrpo_kernels")

_READY = "ready"
_START_SECONDS = 120.0  # importing SymPy on a cold, busy machine
_STALL_SECONDS = 10.0  # beyond the CPU time, for a machine that has other things to do
_MEMORY_BYTES = 2 << 30  # address space; an ordinary question needs 0.1 GiB


class MathWorker:
    """Evaluates formulas in one worker process that starts with the first question.

    A question that takes more than `limit` seconds of the worker's CPU time ends the worker; the next question starts a new one. The
    machine's load is not counted. A formula that used up its CPU time is not asked about again; one that got no answer for another
    reason (a stall, a killed worker) is.

    Args:
        limit: seconds of CPU time for one question.
    """

    def __init__(self, limit: float = 2.0) -> None:
        self.limit = limit
        self._process: subprocess.Popen[bytes] | None = None
        self._hopeless: set[str] = set()  # formulas that used up their CPU time
        self._lock = threading.Lock()
        atexit.register(self.close)

    def evaluate(self, formula: str, seconds: float | None = None) -> tuple[bool, str | None]:
        """Return whether there was an answer, and the closed form or None.

        Args:
            formula: in LaTeX.
            seconds: to wait at most, the worker's start included; None: the CPU limit and a margin for a busy machine.

        Raises:
            ImportError: math-verify is not installed.
            RuntimeError: the worker process does not start.
        """
        with self._lock:
            if formula in self._hopeless:
                return True, None
            deadline = time.monotonic() + seconds if seconds is not None else None
            process = self._running(deadline)
            if process is None:
                return False, None
            wait = self.limit + _STALL_SECONDS
            if deadline is not None:
                wait = min(wait, deadline - time.monotonic())
            reply = self._exchange(process, json.dumps([formula, self.limit]), wait)
            if reply is not None:
                return True, json.loads(reply)
            if process.returncode == -signal.SIGPROF:
                logger.warning(
                    "majority_vote: %r took over %g s of CPU time: it is compared as a text", formula, self.limit
                )
                self._hopeless.add(formula)
                return True, None
            return False, None

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

    def _running(self, deadline: float | None) -> subprocess.Popen[bytes] | None:
        """Return the worker process, started if need be; None where it did not start in time."""
        process = self._process
        if process is not None and process.poll() is None:
            return process
        self.close()  # none yet, died since, or is another process's (after a fork)
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(
                "equivalence='math': expected math-verify, for answers with integrals, sums, products or limits, got none installed; "
                'pip install "mgrpo_kernels[train]" has it, and equivalence="exact" needs none'
            )
        # -P: the script's own folder must not stand on sys.path, where it would shadow other packages' modules.
        process = subprocess.Popen([sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._process = process
        wait = _START_SECONDS if deadline is None else min(_START_SECONDS, deadline - time.monotonic())
        if self._exchange(process, None, wait) == _READY:
            return process
        if process.returncode == -signal.SIGKILL:  # by us, for want of time
            return None
        raise RuntimeError(
            f"equivalence='math': expected the math-verify worker to start, got exit status {process.returncode}; "
            "its own messages are on stderr"
        )

    def _exchange(self, process: subprocess.Popen[bytes], line: str | None, seconds: float) -> str | None:
        """Write a line, if there is one, and return the reply; None, the worker killed, if it dies or is too slow.

        Signals are handled while it waits, and an exception from a handler ends the wait.
        """
        assert process.stdin is not None
        assert process.stdout is not None
        reply = b""
        try:
            if line is not None:
                process.stdin.write(line.encode() + b"\n")
                process.stdin.flush()
            reply = _read_line(process.stdout.fileno(), time.monotonic() + seconds)
        except BrokenPipeError:
            pass  # it died before it read the question: the same as no reply
        finally:
            if not reply.endswith(b"\n"):  # interrupted (Ctrl-C), too: a late reply must not meet the next question
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.05)  # one that ends by itself has a status that says why
                self.close()
        return reply.decode().strip() if reply.endswith(b"\n") else None


def _read_line(file: int, deadline: float) -> bytes:
    """Read to the end of a line, of the file or of the time."""
    line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(file, selectors.EVENT_READ)
        while not line.endswith(b"\n") and (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                part = os.read(file, 1 << 16)
                if not part:
                    break
                line += part
    return line


def _limit_memory() -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _serve() -> None:
    """Answer questions from stdin until it ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not mix with the replies
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's; it closes the pipe in its own time
    _limit_memory()

    import sympy
    from latex2sympy2_extended import latex2sympy

    def evaluate(formula: str) -> str | None:
        try:
            value = latex2sympy(formula).doit()
            unfinished = value.atoms(sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)
            return None if unfinished else sympy.latex(value)
        except MemoryError:
            return None
        except Exception:
            return None

    evaluate(r"\int_0^1 x \, dx")  # the first question loads what the others need: not on its time
    print(_READY, file=replies, flush=True)
    for line in sys.stdin.buffer:
        formula, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process, whatever SymPy is doing
        form = evaluate(formula)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        print(json.dumps(form), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
