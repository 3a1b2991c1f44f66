"""Runs pytest in forks of one process that has imported the large libraries once: scripts/mutants.py starts it in a scratch copy.

A request is a line of JSON on stdin, ``[arguments, file]``: pytest's arguments, and where its output goes. The replies are two lines, the
process id of the fork, which leads a session of its own, and its exit status, negative for a signal. The package under test is never
imported here, only in the forks.
"""

import contextlib
import importlib
import json
import os
import sys
import traceback
from pathlib import Path


def run(arguments: list[str], output: str) -> int:
    """Run pytest in this process; return its exit status."""
    os.setsid()
    nothing, file = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for source, target in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(source, target)
    import pytest

    sys.argv = ["pytest", *arguments]
    return int(pytest.main(arguments))


def main() -> None:
    """Import what the arguments name, as far as it is installed, and answer requests until stdin ends."""
    sys.path[0] = str(Path.cwd())  # as for python -m pytest
    for name in sys.argv[1:]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 3
            try:
                code = run(*json.loads(line))
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
