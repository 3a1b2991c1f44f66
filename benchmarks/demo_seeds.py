"""Whether the demonstration keeps its promise: five seeds of ``python -m mgrpo_kernels.train``, and the first of them twice.

python benchmarks/demo_seeds.py [--seeds 5] [--out benchmarks/results/demo-seeds.json] [--busy [--jobs 2]]

Exit status 1 where it does not: see RISE and LONGEST of the demonstration. With --busy, where other work takes the machine's time, it
runs on one thread, and its CPU time is held to the limit: on a free core it takes hardly more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import machine
import torch

from mgrpo_kernels.train.data.demo import LONGEST, RISE
from mgrpo_kernels.train.watch.lines import read_lines
from mgrpo_kernels.train.watch.metrics import VARYING
from mgrpo_kernels.train.watch.report import environment

ROOT = Path(__file__).resolve().parents[1]
FIGURES = (*RISE, "eval_maj_at_k", "eval_pass_at_k")


def train(seed: int, output: Path, busy: bool) -> dict[str, float]:
    """Run the demonstration; return what it took, start of Python and report included."""
    began = time.monotonic()
    command = [sys.executable, "-m", "mgrpo_kernels.train", "--seed", str(seed), "--output", str(output)]
    threads = {"OMP_NUM_THREADS": "1"} if busy else {}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, **threads})
    _, status, used = os.wait4(process.pid, 0)  # the CPU time of this one
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    load = round(os.getloadavg()[0], 1)
    cpu = round(used.ru_utime + used.ru_stime, 1)
    return {"seconds": round(time.monotonic() - began, 1), "cpu_seconds": cpu, "load_average": load}


def result(seed: int, output: Path, took: dict[str, float]) -> dict[str, Any]:
    evaluated = [line for line in read_lines(output / "metrics.jsonl") if line.get("eval_accuracy") is not None]
    values = {key: [line[key] for line in evaluated] for key in FIGURES}
    return {
        "seed": seed,
        **took,
        "steps": [line["step"] for line in evaluated],
        **{key: {"start": v[0], "best": max(v), "end": v[-1], "all": v} for key, v in values.items()},
    }


def same_bits(one: Path, other: Path) -> bool:
    def lines(output: Path) -> list[dict[str, Any]]:
        rows = read_lines(output / "metrics.jsonl") + read_lines(output / "samples.jsonl")
        return [{key: value for key, value in row.items() if key not in VARYING} for row in rows]

    weights = [(each / "final" / "model.safetensors").read_bytes() for each in (one, other)]
    return lines(one) == lines(other) and weights[0] == weights[1]


def broken(runs: list[dict[str, Any]], repeats: bool, clock: str) -> list[str]:
    """Return what was promised and not kept."""
    found = [] if repeats else ["two runs of one seed differ"]
    for key, rise in RISE.items():
        rises = [run[key]["end"] - run[key]["start"] for run in runs]
        if sum(rises) / len(rises) < rise:
            found.append(f"{key}: expected a mean rise of {rise}, got {sum(rises) / len(rises):.3f}")
        found += [
            f"{key}: expected a rise of {rise / 2}, got {each:.3f} with seed {run['seed']}"
            for run, each in zip(runs, rises, strict=True)
            if each < rise / 2
        ]
    slowest = max(run[clock] for run in runs)
    return [*found, f"expected at most {LONGEST} {clock}, got {slowest}"] if slowest > LONGEST else found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "demo-seeds.json")
    parser.add_argument("--busy", action="store_true", help="one thread, timed by its CPU time")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; more than one with --busy alone")
    options = parser.parse_args()
    clock, runs = "cpu_seconds" if options.busy else "seconds", []
    if options.jobs > 1 and not options.busy:
        parser.error("--jobs: expected 1 without --busy, whose runs are timed by the clock")
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(options.jobs) as pool:
        outputs = [Path(place) / str(seed) for seed in range(options.seeds)]
        again = Path(place) / "again"
        jobs = [pool.submit(train, seed, output, options.busy) for seed, output in enumerate(outputs)]
        jobs.append(pool.submit(train, 0, again, options.busy))
        for seed, (output, job) in enumerate(zip(outputs, jobs[:-1], strict=True)):
            runs.append(result(seed, output, job.result()))
            rises = ", ".join(f"{key} {runs[-1][key]['start']:.3f} -> {runs[-1][key]['end']:.3f}" for key in RISE)
            print(f"seed {seed}: {rises}, {runs[-1][clock]} {clock}", flush=True)
        jobs[-1].result()
        repeats = same_bits(outputs[0], again)
    complaints = broken(runs, repeats, clock)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    means = {key: sum(run[key]["end"] - run[key]["start"] for run in runs) / len(runs) for key in RISE}
    text = {
        "environment": environment(device) | machine.stamp(),
        "timed_by": clock,
        "mean_rise": means,
        "same_bits_twice": repeats,
        "broken": complaints,
        "runs": runs,
    }
    options.out.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    print("\n".join(complaints) or f"kept; mean rise {means}; {options.out}")
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main())
