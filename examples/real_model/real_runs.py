"""Train a real language model, SmolLM2-135M-Instruct, to multiply small numbers, without labels and beside runs with other rewards.

    python examples/real_model/real_runs.py               three cells with three seeds, a run on each core
    python examples/real_model/real_runs.py --cells mgrpo --seeds 1
    python examples/real_model/real_runs.py --cells --results examples/real_model/results.jsonl --figure docs/real_model.png

The model comes from a package index (scripts/real_model.py). A run that is in the results is not repeated, so this can be interrupted and
continued. Each finished run is one line of JSON with its options, the processor, its seconds, and its held-out accuracy at each
evaluation with standard errors. The table of them is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from task import write_task

from mgrpo_kernels.train.watch.lines import read_lines
from mgrpo_kernels.train.watch.report import cpu_name

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "scripts"), str(ROOT / "examples" / "collapse")]
from real_model import real_model  # noqa: E402
from summary import by_cell, draw, read  # noqa: E402

RESULTS = ROOT / "runs" / "real_model.jsonl"
COMMON = {
    "steps": 20,
    "prompts-per-step": 8,
    "rollouts": 8,
    "max-response-tokens": 16,
    "learning-rate": 1e-5,
    "kl-coef": 0.0,
    "answer-from": "last-number",
    "answer-kind": "number",
    "eval-every": 5,
    "eval-samples": 4,
    "keep-checkpoints": 1,
    "device": "cpu",
}
CELLS: dict[str, tuple[str, dict[str, str]]] = {
    "mgrpo": ("M-GRPO, no labels", {"method": "mgrpo"}),
    "vote": ("the plain vote (SRT), no labels", {"method": "srt"}),
    "gold": ("the true answers", {"method": "gold"}),
    "mgrpo-tolerance": (
        "M-GRPO, gradients to a tolerance of 2^-8",
        {"method": "mgrpo", "gradient-tolerance": "0.00390625"},
    ),
    "mgrpo-vllm": ("M-GRPO, no labels, sampled by vLLM", {"method": "mgrpo", "engine": "vllm"}),
}
KEPT = ("step", *(name + end for name in ("eval_accuracy", "eval_greedy", "eval_maj_at_k") for end in ("", "_error")))
AVERAGED = ("label_accuracy", "vote_share", "gradient_share", "behaviour_mismatch")
"""Metrics that are averaged over the run's steps."""


def take(cell: str, seed: int, model: Path, files: tuple[Path, Path], options: dict[str, object]) -> dict[str, Any]:
    """Run one cell with one seed, and return its line of results."""
    given = {"model": model, "data": files[0], "eval-data": files[1], "seed": seed, **options}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "mgrpo_kernels.train", "--output", f"{place}/run"]
        done = subprocess.run(
            [*command, *(f"--{name}={value}" for name, value in given.items())],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            raise RuntimeError(f"{cell}, seed {seed}: exit status {done.returncode}\n{done.stderr[-2000:]}")
        lines = read_lines(Path(place, "run", "metrics.jsonl"))
    evaluated = [line for line in lines if line.get("eval_accuracy") is not None]
    known = {key: [line[key] for line in lines if line.get(key) is not None] for key in AVERAGED}
    return {
        "cell": cell,
        "seed": seed,
        "options": options,
        "cpu": f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "seconds": round(time.perf_counter() - start),
        "curve": {key: [line[key] for line in evaluated] for key in KEPT},
        "means": {key: round(sum(values) / len(values), 5) for key, values in known.items() if values},
    }


def table(runs: Iterable[dict[str, Any]]) -> str:
    """Return a line for each cell: held-out accuracy before and after, over its seeds, and seconds a run."""
    lines = [
        "| trained with | seeds | accuracy before | after | greedy before | after | minutes a run |",
        "|---|---|---|---|---|---|---|",
    ]
    found = by_cell(list(runs))
    for cell in (each for each in CELLS if each in found):
        of_cell = found[cell]
        shown = [mean_of(of_cell, key, at) for key in ("eval_accuracy", "eval_greedy") for at in (0, -1)]
        minutes = sum(run["seconds"] for run in of_cell) / len(of_cell) / 60
        lines.append(f"| {CELLS[cell][0]} | {len(of_cell)} | {' | '.join(shown)} | {minutes:.0f} |")
    return "\n".join(lines)


def mean_of(runs: list[dict[str, Any]], key: str, at: int) -> str:
    """Return the mean over seeds of a held-out metric at an evaluation, and its standard error.

    The seeds share the held-out questions. The error is the mean of the runs' own, which counts the questions once.
    """
    values = [run["curve"][key][at] for run in runs]
    error = math.fsum(run["curve"][f"{key}_error"][at] for run in runs) / len(runs)
    spread = f" ({min(values):.2f} - {max(values):.2f})" if len(values) > 1 and min(values) < max(values) else ""
    return f"{math.fsum(values) / len(values):.2f} ± {error:.2f}{spread}"


def main() -> None:
    """Run every cell and seed that is missing in the results, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="*", choices=CELLS, default=["mgrpo", "vote", "gold"], metavar="CELL")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="number of seeds, from 0 (default: 3)")
    parser.add_argument("--steps", type=int, default=COMMON["steps"], metavar="N", help="steps of a run (default: 20)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="runs at a time (default: cores)")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FILE", help="(default: runs/real_model.jsonl)"
    )
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the curves")
    given = parser.parse_args()
    given.results.parent.mkdir(parents=True, exist_ok=True)
    have = read(given.results)
    wanted = {
        (cell, seed): {**COMMON, "steps": given.steps, **CELLS[cell][1]}
        for seed in range(given.seeds)
        for cell in given.cells
    }
    for run in have:
        key = run["cell"], run["seed"]
        if wanted.get(key, run["options"]) != run["options"]:
            sys.exit(
                f"{given.results}: expected {key} with {wanted[key]}, got {run['options']}: name another --results"
            )
    missing = [key for key in wanted if key not in {(run["cell"], run["seed"]) for run in have}]
    print(f"{len(wanted)} runs, {len(missing)} of them missing", flush=True)
    if missing:
        model, files = real_model(), write_task(ROOT / "build" / "real_task")
    lock = Lock()

    def one(key: tuple[str, int]) -> None:
        line = take(*key, model, files, wanted[key])
        with lock, given.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        accuracy = line["curve"]["eval_accuracy"]
        print(f"{key[0]:10} seed {key[1]}  {accuracy[0]:.3f} -> {accuracy[-1]:.3f}  {line['seconds']} s", flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(one, missing))
    print(table(read(given.results)))
    if given.figure:
        titled = {CELLS[cell][0]: runs for cell, runs in by_cell(read(given.results)).items()}
        draw(titled, given.figure, ["eval_accuracy", "eval_greedy", "eval_maj_at_k"])


if __name__ == "__main__":
    main()
