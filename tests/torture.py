"""Kill -9 at chosen moments of a run, resume, and compare every bit with the run left alone: ``make torture`` does it 20 times.

Then it does the faults of torture_faults.py, and writes the table of both to docs/torture.json, which docs/generate.py reads.

The trainer runs in a process that kills itself, by SIGKILL, at the n-th event of a kind: a token sampled, a step's line written, the
optimizer's step, or anything that a checkpoint does to the disk. What is left on the disk is what a kill from outside leaves there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE.parent / "train")]

import torture_faults  # noqa: E402 - it lies beside this file

STEPS = 10
EVENTS = {"rollout": (20, 100), "checkpoint": (1, 460), "line": (2, 5 * STEPS), "update": (1, STEPS - 1)}
"""Kinds of event, and the range that the n-th is drawn from: of tokens, disk operations, lines of metrics.jsonl
and samples.jsonl, optimizer steps."""
MOMENTS = {
    "rollout": "a random token",
    "checkpoint": "a random disk operation of a checkpoint",
    "line": "a random line of metrics or samples",
    "update": "a random optimizer step",
}


def flags() -> list[str]:
    import tiny

    return [*tiny.FLAGS, "--steps", str(STEPS), "--checkpoint-every", "3", "--eval-every", "5"]


def die_at(event: str, number: int) -> None:
    """Let this process kill itself right before the event comes for the n-th time."""
    import torch

    from mgrpo_kernels.train.run.stopping import Interrupt
    from mgrpo_kernels.train.watch.lines import Lines

    left, torch_save = number, torch.save

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= event != "checkpoint" or function is torch_save or in_checkpoints(args[0])
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    places: list[tuple[Any, Sequence[str]]] = {
        "rollout": [(Interrupt, ["check"])],
        "line": [(Lines, ["write"])],
        "update": [(torch.optim.AdamW, ["step"])],
        "checkpoint": [
            (os, ["fsync"]),
            (Path, ["mkdir", "rename", "replace", "symlink_to"]),
            (torch, ["save"]),
            (shutil, ["rmtree"]),
        ],
    }[event]
    for owner, names in places:
        for name in names:
            setattr(owner, name, counted(getattr(owner, name)))


def in_checkpoints(target: int | Path) -> bool:
    """Return whether a path, or the file of a descriptor, is that of a checkpoint: other files of a run are synced and replaced, too."""
    place = Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else Path(target).parent
    return "checkpoints" in place.parts


def child(event: str, number: int, arguments: Sequence[str]) -> int:
    import mgrpo_kernels.train.run.start  # noqa: F401  before anything is counted
    from mgrpo_kernels.train import __main__ as command

    die_at(event, number)
    return command.main(arguments)


def killed(event: str, number: int, output: Path, *more: str) -> bool:
    """Start a run that dies at the event; return whether it did, not having ended before."""
    command = [sys.executable, str(HERE), "child", event, str(number), *flags(), *more, "--output", str(output)]
    done = subprocess.run(
        command,
        text=True,
        capture_output=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stdout + done.stderr
    return done.returncode != 0


def differences(one: Path, two: Path) -> list[str]:
    """Return the names of what differs between two runs' outputs, times aside."""
    import tiny

    different = [name for name in ("metrics.jsonl", "samples.jsonl") if tiny.lines(one, name) != tiny.lines(two, name)]
    different += [
        name
        for name in ("model.safetensors", "config.json")
        if (one / "final" / name).read_bytes() != (two / "final" / name).read_bytes()
    ]
    from mgrpo_kernels.train.run import checkpoint

    states = [checkpoint.read(each / "checkpoints" / "latest", "") for each in (one, two)]
    different += [
        name for name in states[0].keys() | states[1].keys() if not bits_equal(states[0].get(name), states[1].get(name))
    ]
    return different


def bits_equal(one: Any, two: Any) -> bool:
    import torch

    return one is not None and two is not None and torch.equal(one, two)


def kills(root: Path, times: int, seed: int) -> Iterator[torture_faults.Row]:
    """Kill and resume; yield a row for each kind of event."""
    import tiny

    chance, kinds = random.Random(seed), list(EVENTS)
    whole = tiny.output_with(root / "base", root / "whole")
    process = torture_faults.started(torture_faults.alone(whole, *flags()))
    assert torture_faults.ended(process)[0] == 0
    failed: dict[str, list[bool]] = {event: [] for event in kinds}
    for turn in range(times):
        event = kinds[turn % len(kinds)]
        number = chance.randint(*EVENTS[event])
        output = tiny.output_with(root / "base", root / f"run_{turn}")
        assert killed(event, number, output), f"{event} {number}: the run ended before"
        there = sorted(each.name for each in (output / "checkpoints").iterdir())
        status, text = torture_faults.ended(torture_faults.started(torture_faults.alone(output, "--resume")))
        different = differences(whole, output) if status == 0 else [text[-2000:]]
        failed[event].append(bool(different))
        print(f"torture: killed at {event} {number}, left {there}: {different or 'the same bits'}", flush=True)
    for event, results in failed.items():
        yield torture_faults.Row(f"kill -9 at {MOMENTS[event]}", len(results), sum(results), 0, 0)


def enter(file: Path, row: torture_faults.Row) -> None:
    """Add a row to the table in a file, or replace the one of that fault."""
    known = {each["fault"]: each for each in json.loads(file.read_text(encoding="utf-8"))} if file.exists() else {}
    known[row.fault] = row._asdict()
    file.write_text(json.dumps(list(known.values()), indent=1) + "\n", encoding="utf-8")


def main(times: int, seed: int, chosen: str, out: Path | None) -> int:
    """Do every fault; return the exit status: 0 where nothing was lost, hung or misleading."""
    import tiny

    table: list[torture_faults.Row] = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        tiny.make_base(root / "base")
        bench = torture_faults.Bench(root, flags())
        killed_rows = kills(root, times, seed) if times else ()
        for row in itertools.chain(killed_rows, torture_faults.rows(bench, chosen)):
            table.append(row)
            print(f"torture: {row}", flush=True)
            if out is not None:
                enter(out, row)
    return 1 if any(row.lost or row.hung or row.misleading for row in table) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        sys.exit(child(sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20, help="runs that are killed (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the moments (default: 0)")
    parser.add_argument(
        "--faults", default="", metavar="TEXT", help="only the other faults whose name matches this expression"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="table to write, or to replace these rows of")
    given = parser.parse_args()
    sys.exit(main(given.times, given.seed, given.faults, given.out))
