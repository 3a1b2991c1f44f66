"""Faults other than kill -9: each is done to a real run, which must end or continue with a clear message, hang nowhere and lose nothing.

``make torture`` runs them and writes the table that docs/long_runs.md shows. Runs of two ranks are started by torchrun. This file is also
the program of such a rank: it sets a fault up in one of them, and then trains.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE.parent / "train")]

LIMIT = 400
"""Seconds after which a run counts as hung, on a machine with much else to do."""
RANK_TIMEOUT = 20
TRACE = f'File "{HERE.parents[1]}/mgrpo_kernels'
"""What a traceback of the trainer contains, and torchrun's own does not."""


class Row(NamedTuple):
    """A row of the table."""

    fault: str
    tried: int
    lost: int  # tries after which a step, a line or a bit was not that of the run left alone
    hung: int
    misleading: int  # tries without the message that says what happened


class Hung(Exception):
    """A run did not end in time."""


# --- The program of a rank


def set_up(event: str, number: int) -> None:
    """Prepare a fault in this process, at the n-th optimizer step where it is one in the midst of training."""
    import torch

    from mgrpo_kernels import majority_vote
    from mgrpo_kernels.train import step
    from mgrpo_kernels.train.data import demo
    from mgrpo_kernels.vote import symbolic

    def slow_verifier() -> None:
        symbolic._worker.evaluate("\\int_0^1 x dx")
        assert symbolic._worker._process is not None
        os.kill(symbolic._worker._process.pid, signal.SIGSTOP)
        majority_vote(["\\int_0^1 2x dx", "1"], 2, seconds=3.0)

    acts: dict[str, Callable[[], Any]] = {
        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "hung": lambda: os.kill(os.getpid(), signal.SIGSTOP),
        "memory": lambda: torch.empty(2**50),
        "verifier": slow_verifier,
    }
    if event in acts:
        at_call(step, "take_step", number, acts[event])
    elif event == "data":
        make = demo.make_task
        demo.make_task = lambda seed: make(seed + 1)
    elif event == "rename":
        for name in ("rename", "replace"):
            real = getattr(Path, name)
            setattr(Path, name, lambda self, target, real=real: only_to_new(real, self, target))
    elif event == "clock":
        real_time, jumps = time.time, iter(range(10**9))
        time.time = lambda: real_time() + 86400 * (-1) ** next(jumps)


def at_call(owner: Any, name: str, number: int, act: Callable[[], Any]) -> None:
    """Act right before a function of a module is called for the n-th time."""
    real, left = getattr(owner, name), number

    def call(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            act()
        return real(*args, **options)

    setattr(owner, name, call)


def only_to_new(real: Any, path: Path, target: Path) -> Any:
    if target.exists() or target.is_symlink():
        raise FileExistsError(17, "File exists", str(target))
    return real(path, target)


def rank(event: str, number: int, where: int, arguments: list[str]) -> int:
    import torch

    import mgrpo_kernels.train.run.start  # noqa: F401  before anything is replaced
    from mgrpo_kernels.train import __main__ as command

    torch.set_num_threads(1)
    if int(os.environ.get("RANK", "0")) == where and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        set_up(event, number)
    return command.main(arguments)


# --- Runs


def started(command: list[str], **environment: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join(sys.path[:3])
    return subprocess.Popen(
        command,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=HERE.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment},
    )


def ended(process: subprocess.Popen[str], limit: float = LIMIT) -> tuple[int, str]:
    """Return exit status and output.

    Raises:
        Hung: it does not end; it is ended then.
    """
    try:
        text, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
        raise Hung from None
    return process.returncode, text


def ranks(
    output: Path, *flags: str, event: str = "none", number: int = 0, restarts: int = 0, nodes: int = 1
) -> list[str]:
    """Return the command of two ranks on this machine, the second of which has the fault."""
    where = ["--standalone", "--nproc-per-node", "2"] if nodes == 1 else ["--nproc-per-node", "1"]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *where,
        "--max-restarts",
        str(restarts),
        "--monitor-interval",
        "0.1",
        str(HERE),
        "rank",
        event,
        str(number),
        "1",
        *flags,
        "--output",
        str(output),
    ]


def alone(output: Path, *flags: str, event: str = "none") -> list[str]:
    return [sys.executable, str(HERE), "rank", event, "0", "0", *flags, "--output", str(output)]


class Bench:
    """A place for runs, and what they look like when nothing disturbs them."""

    def __init__(self, root: Path, flags: list[str]) -> None:
        import tiny

        self.root, self._count = root, 0
        self.flags = [*flags, "--steps", "7", "--rank-timeout", str(RANK_TIMEOUT), "--plain"]
        if not (root / "base").exists():
            tiny.make_base(root / "base")
        self._whole: dict[int, Path] = {}

    def output(self) -> Path:
        import tiny

        self._count += 1
        return tiny.output_with(self.root / "base", self.root / f"fault_{self._count}")

    def whole(self, size: int) -> Path:
        """Return the output of an undisturbed run of so many ranks."""
        if size not in self._whole:
            place = self.output()
            status, text = ended(started((ranks if size == 2 else alone)(place, *self.flags)))
            assert status == 0, text
            self._whole[size] = place
        return self._whole[size]

    def resumed(self, output: Path, size: int) -> set[str]:
        """Resume a run to its end; return {"lost"} unless every bit is that of the undisturbed run."""
        import torture

        status, text = ended(started((ranks if size == 2 else alone)(output, "--resume")))
        if status != 0:
            print(text[-3000:])
            return {"lost"}
        return {"lost"} if torture.differences(self.whole(size), output) else set()


Problems = set[str]


def told(text: str, *wanted: str) -> Problems:
    """Return {"misleading"} unless the output has every text that says what happened, and no traceback."""
    missing = [each for each in wanted if each not in text]
    if missing or TRACE in text:
        print(f"expected {missing or 'no traceback'} in:\n{text[-3000:]}")
        return {"misleading"}
    return set()


# --- Faults


def killed_rank(bench: Bench, number: int) -> Problems:
    import torture

    output = bench.output()
    status, text = ended(started(ranks(output, *bench.flags, event="killed", number=number, restarts=1)))
    same = status == 0 and not torture.differences(bench.whole(2), output)
    return (set() if same else {"lost"}) | (
        {"misleading"} if text.count("resuming after step") != int(number > 4) else set()
    )


def hung_rank(bench: Bench, number: int) -> Problems:
    output = bench.output()
    status, text = ended(started(ranks(output, *bench.flags, event="hung", number=number)))
    wrong = told(text, "lost contact with another rank") if status != 0 else {"misleading"}
    return wrong | bench.resumed(output, 2)


def rank_without_memory(bench: Bench, number: int) -> Problems:
    output = bench.output()
    status, text = ended(started(ranks(output, *bench.flags, event="memory", number=number)))
    wrong = told(text, "error: out of memory: ") if status != 0 else {"misleading"}
    return wrong | bench.resumed(output, 2)


def ranks_with_other_data(bench: Bench, _: int) -> Problems:
    output = bench.output()
    before = sorted(each.name for each in output.iterdir())
    _, text = ended(started(ranks(output, *bench.flags, event="data")))
    wrote = sorted(each.name for each in output.iterdir()) != before
    return told(text, "rank 1: expected the training prompts of rank 0") | ({"lost"} if wrote else set())


def verifier_that_hangs(bench: Bench, number: int) -> Problems:
    import torture

    output = bench.output()
    status, text = ended(started(ranks(output, *bench.flags, event="verifier", number=number)))
    same = status == 0 and not torture.differences(bench.whole(2), output)
    return told(text, "the time for formulas, 3 s, is used up") | (set() if same else {"lost"})


def other_number_of_ranks(bench: Bench, number: int) -> Problems:
    """Rounding differs with the number of ranks, so that steps and answers are compared, and no bits."""
    import tiny

    output = bench.output()
    ended(started(ranks(output, *bench.flags, event="memory", number=max(number, 5))))
    status, text = ended(started(alone(output, "--resume")))
    columns = [
        [(line["step"], line.get("reward_mean")) for line in tiny.lines(each)] for each in (bench.whole(2), output)
    ]
    return told(text, "resuming after step ") | (set() if status == 0 and columns[0] == columns[1] else {"lost"})


def one_process(event: str) -> Callable[[Bench, int], Problems]:
    """Return a fault of a whole run of one process, which is stopped by SIGTERM half way and resumed with the same fault."""

    def act(bench: Bench, _: int) -> Problems:
        import torture

        output = bench.output()
        process = started(alone(output, *bench.flags, event=event))
        wait_for(output / "checkpoints" / "step_3", process)
        process.send_signal(signal.SIGTERM)
        first, text = ended(process)
        second, more = ended(started(alone(output, "--resume", event=event)))
        same = first in (0, 130) and second == 0 and not torture.differences(bench.whole(1), output)
        return told(text + more, "resuming after step") | (set() if same else {"lost"})

    return act


def full_disk(bench: Bench, number: int) -> Problems:
    """A file system of some megabytes, which is full before the run ends; then resumed on a copy with room."""
    import torture

    output, small = bench.output(), bench.root / f"small_{number}"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2600 + 300 * number}k", "tmpfs", str(small)], check=True)
    try:
        shutil.copytree(output / "base", small / "run" / "base")
        status, text = ended(started(alone(small / "run", *bench.flags)))
        shutil.rmtree(output)
        shutil.copytree(small / "run", output)  # without the link, as many tools copy
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert status in (0, 1, 2), text
    wrong = told(text, "No space left on device")
    status, more = ended(started(alone(output, "--resume")))
    same = status == 0 and not torture.differences(bench.whole(1), output)
    if not same:
        print(text[-1500:], more[-1500:])
    return wrong | (set() if same else {"lost"})


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT
    while not path.exists() and process.poll() is None:
        if time.monotonic() > deadline:
            raise Hung
        time.sleep(0.01)


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Yield two network namespaces with a link between them, 10.77.0.1 and 10.77.0.2."""
    names = f"mgrpo-a-{os.getpid()}", f"mgrpo-b-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", names[0]], check=True)
    subprocess.run(["ip", "netns", "add", names[1]], check=True)
    try:
        link = [
            "ip",
            "link",
            "add",
            "link0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "link0",
            "netns",
            names[1],
        ]
        subprocess.run(link, check=True)
        for number, name in enumerate(names, 1):
            for words in (f"addr add 10.77.0.{number}/24 dev link0", "link set link0 up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *words.split()], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def link_cut(seconds: float | None) -> Callable[[Bench, int], Problems]:
    """Return a fault of two machines: the link between them is cut for so many seconds, or for good."""

    def act(bench: Bench, _: int) -> Problems:
        import torture

        output = bench.output()
        with two_hosts() as hosts:

            def both(*flags: str) -> list[subprocess.Popen[str]]:
                command = ranks(output, *flags, nodes=2)
                where = ["--nnodes", "2", "--master-addr", "10.77.0.1", "--master-port", "29577"]
                return [
                    started(
                        ["ip", "netns", "exec", host, *command[:3], *where, "--node-rank", str(number), *command[3:]],
                        GLOO_SOCKET_IFNAME="link0",
                    )
                    for number, host in enumerate(hosts)
                ]

            processes = both(*bench.flags)
            wait_for(output / "checkpoints" / "step_3", processes[0])
            subprocess.run(["ip", "-n", hosts[0], "link", "set", "link0", "down"], check=True)
            if seconds is not None:
                time.sleep(seconds)
                subprocess.run(["ip", "-n", hosts[0], "link", "set", "link0", "up"], check=True)
            done = [ended(each) for each in processes]
            if seconds is not None:
                same = [status for status, _ in done] == [0, 0] and not torture.differences(bench.whole(2), output)
                return set() if same else {"lost"}
            wrong = told(done[0][1], "lost contact with another rank")
            subprocess.run(["ip", "-n", hosts[0], "link", "set", "link0", "up"], check=True)
            done = [ended(each) for each in both("--resume")]
            same = [status for status, _ in done] == [0, 0] and not torture.differences(bench.whole(2), output)
            return wrong | (set() if same else {"lost"})

    return act


def servers(test: str) -> Callable[[Bench, int], Problems]:
    """Return a fault of vLLM servers, which a test of the engine does to two real ones."""

    def act(_: Bench, __: int) -> Problems:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/engine/test_server.py",
            "-k",
            test,
        ]
        status, text = ended(started(command, CI="true"), 2 * LIMIT)
        if status != 0:
            print(text[-3000:])
        return set() if status == 0 else {"lost"}

    return act


FAULTS: dict[str, tuple[Callable[[Bench, int], Problems], tuple[int, ...]]] = {
    "one of two ranks is killed; torchrun starts both again": (killed_rank, (5,)),
    "one of two ranks hangs": (hung_rank, (4,)),
    "one of two ranks has no memory left": (rank_without_memory, (4,)),
    "two ranks read different data": (ranks_with_other_data, (0,)),
    "the verifier hangs on one of two ranks": (verifier_that_hangs, (3,)),
    "a run of two ranks is resumed by one": (other_number_of_ranks, (5,)),
    "the link between two machines is cut for 5 s": (link_cut(5.0), (0,)),
    "the link between two machines is cut for good": (link_cut(None), (0,)),
    "the file system does not rename over a file": (one_process("rename"), (0,)),
    "the clock jumps by a day, back and forth": (one_process("clock"), (0,)),
    "the disk is full before the run ends": (full_disk, (0, 4)),
    "one of two vLLM servers hangs in a batch": (servers("test_y"), (0,)),
    "one of two vLLM servers dies in a batch, then the other": (servers("test_z"), (0,)),
}
"""Each fault, and the numbers of the optimizer steps or sizes that it is tried with."""


def rows(bench: Bench, chosen: str = "") -> Iterator[Row]:
    """Do every fault whose name matches `chosen`, and yield its row."""
    for name, (act, numbers) in FAULTS.items():
        if not re.search(chosen, name):
            continue
        found: list[Problems] = []
        for number in numbers:
            try:
                found.append(act(bench, number))
            except Hung:
                found.append({"hung"})
        yield Row(name, len(numbers), *(sum(kind in each for each in found) for kind in ("lost", "hung", "misleading")))


if __name__ == "__main__":
    sys.exit(rank(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]))
