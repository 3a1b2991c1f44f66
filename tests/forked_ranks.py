"""Runs a script or a module as two ranks, which are forks of one process: the large libraries are imported once.

python tests/forked_ranks.py LIBRARY,LIBRARY SCRIPT arguments...     SCRIPT: a file *.py, or the name of a module

The ranks find each other as under torchrun. Nothing is restarted. If one fails, or this process is ended by SIGTERM, the others are ended.
"""

import importlib
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

RANKS = 2


def run(script: str, arguments: list[str]) -> None:
    """Run it as Python would by itself."""
    is_file = script.endswith(".py")
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent if is_file else Path.cwd())
    if is_file:
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def wait(ranks: list[int]) -> int:
    """Wait until all ranks have ended, or one has failed; return 1 if one failed, else 0. `ranks` then has those that still run."""
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status != 0:
            return 1
    return 0


def main() -> int:
    libraries, script, *arguments = sys.argv[1:]
    for name in libraries.split(","):
        importlib.import_module(name)
    listening = socket.create_server(("localhost", 0))
    common = {"WORLD_SIZE": RANKS, "MASTER_ADDR": "localhost", "MASTER_PORT": listening.getsockname()[1]}
    ranks: list[int] = []
    for rank in range(RANKS):
        if (pid := os.fork()) == 0:
            listening.close()
            variables = {**common, "RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_USE_AGENT_STORE": True}
            os.environ.update({name: str(value) for name, value in variables.items()})
            run(script, arguments)
            return 0
        ranks.append(pid)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        from torch.distributed import TCPStore  # its thread starts here: a fork would not have it

        port, descriptor = listening.getsockname()[1], listening.detach()
        store = TCPStore("localhost", port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)
        status = wait(ranks)
        del store
        return status
    finally:
        for each in ranks:
            os.kill(each, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
