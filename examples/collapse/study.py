"""Run the collapse study: one run of ``python -m mgrpo_kernels.train`` on one core for each cell (a set of options) and each seed.

    python examples/collapse/study.py                      runs the main cells with three seeds
    python examples/collapse/study.py --all --seeds 5      runs every cell with five seeds
    python examples/collapse/study.py --cells srt mgrpo    runs these cells
    python examples/collapse/study.py --cost --seeds 1 --jobs 1 --results FILE    measures the time of a step of each method

The study can be interrupted and continued: a run that is in the results is not repeated. Each finished run is one line of JSON with its
options, the processor, and its metrics at each evaluation. ``summary.py`` prints their table, draws their figures, and compares them with
the project's results, ``results.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from cells import CELLS, COMMON, COST, FULL, LAZY_RESPONSE, LAZY_SHARE, MAIN, NOT_OPTIONS, WARM_STEPS

from mgrpo_kernels.train.data import demo
from mgrpo_kernels.train.run.loop import COLLAPSED as STOPPED_BY_GUARD
from mgrpo_kernels.train.watch.certificate import CERTIFICATE
from mgrpo_kernels.train.watch.lines import read_lines
from mgrpo_kernels.train.watch.report import cpu_name

OWN = Path(__file__).parent
KEPT = ("step", "eval_accuracy", "eval_greedy", "eval_maj_at_k")
AVERAGED = (
    "vote_share",
    "label_accuracy",
    "distinct_labels",
    "top_answer_share",
    "entropy",
    "pruned_fraction",
    "momentum_distance",
    "teacher_agreement",
    "unparsed_fraction",
)
"""Metrics that are averaged over the steps since the previous evaluation."""


def arguments_of(options: dict[str, object]) -> list[str]:
    """Return the options as command-line arguments of the trainer."""
    out = []
    for name, value in options.items():
        if name in NOT_OPTIONS:
            continue
        flag = name.replace("_", "-")
        out += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return out


def command_of(options: dict[str, object]) -> list[str]:
    """Return the command of a run: the trainer's, or that of quartiles.py, and the options."""
    kind = options.get("quartiles")
    trainer = ["-m", "mgrpo_kernels.train"] if kind is None else [str(OWN / "quartiles.py"), str(kind)]
    return [sys.executable, *trainer, *arguments_of(options)]


def curve_of(lines: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Return columns with one value for each evaluation."""
    columns: dict[str, list[float | None]] = {key: [] for key in (*KEPT, *AVERAGED)}
    since: list[dict[str, Any]] = []
    for line in lines:
        since.append(line)
        if line.get("eval_accuracy") is None:
            continue
        for key in KEPT:
            columns[key].append(line[key])
        for key in AVERAGED:
            known = [each[key] for each in since if each.get(key) is not None]
            columns[key].append(round(sum(known) / len(known), 5) if known else None)
        since = []
    return columns


def of_certificate(found: dict[str, Any]) -> dict[str, Any]:
    """Return what the results keep of a run's certificate: its fall, its warnings without their values, and the lead times."""
    warnings = [
        {"step": each["step"], "signs": sorted(each["signs"]), "label_free": each["label_free"]}
        for each in found["warnings"]
    ]
    return {"warnings": warnings, **{key: found[key] for key in ("fall_step", "lead_steps", "lead_steps_label_free")}}


def step_seconds(lines: list[dict[str, Any]]) -> float:
    """Return the median duration of a step, in seconds, without the evaluations."""
    parts = [[value for key, value in line.items() if key.startswith("time_") and value] for line in lines]
    return round(statistics.median(sum(each) for each in parts if each), 5)


def own_lesson(draw: random.Random, held_out: set[str]) -> tuple[str, str]:
    return demo.lesson(draw, held_out, lengthened_share=0.0)


def lazy_lesson(draw: random.Random, held_out: set[str]) -> tuple[str, str]:
    prompt, response = own_lesson(draw, held_out)
    return prompt, LAZY_RESPONSE if draw.random() < LAZY_SHARE else response


def base_of(name: str, seed: int, bases: Path) -> Path:
    """Return the path of a seed's start model: the trainer's built-in model, but trained on equally many sums of each length."""
    place = bases / f"{name}-{seed}"
    if not place.exists():
        teach = {"own": own_lesson, "lazy": lazy_lesson}[name]
        demo.make_model(place, seed, torch.device("cpu"), WARM_STEPS, teach=teach)
    return place


def take(
    cell: str, seed: int, options: dict[str, object], device: str, base: Path, kept: Path | None = None
) -> dict[str, Any]:
    """Run one cell with one seed, and return its line of results. Its metrics and certificate are copied to `kept`."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(base, f"{place}/run/base")  # a run of the built-in task uses a model that is already here
        done = subprocess.run(
            [*command_of(options), f"--seed={seed}", f"--device={device}", "--output", f"{place}/run"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode not in (0, STOPPED_BY_GUARD):
            raise RuntimeError(f"{cell}, seed {seed}: exit status {done.returncode}\n{done.stderr[-2000:]}")
        lines = read_lines(Path(place, "run", "metrics.jsonl"))
        found = json.loads(Path(place, "run", CERTIFICATE).read_text(encoding="utf-8"))
        if kept is not None:
            target = kept / f"{cell.replace('/', ' of ')}, seed {seed}"
            target.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", CERTIFICATE):
                shutil.copy(f"{place}/run/{name}", target)
    return {
        "cell": cell,
        "seed": seed,
        "options": options,
        "cpu": f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "seconds": round(time.perf_counter() - start),
        "step_seconds": step_seconds(lines),
        "stopped": lines[-1]["step"] if done.returncode else None,
        "certificate": of_certificate(found),
        "curve": curve_of(lines),
    }


def read(path: Path) -> list[dict[str, Any]]:
    return read_lines(path) if path.exists() else []


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="run every reported cell (default: the main cells)")
    which.add_argument("--cost", action="store_true", help="run a few steps of each method, for the time of a step")
    which.add_argument(
        "--cells", nargs="+", choices=list(CELLS), metavar="CELL", help=f"cells to run, of: {'; '.join(CELLS)}"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="number of seeds (default: 3)")
    parser.add_argument("--first-seed", type=int, default=2, metavar="S", help="first seed (default: 2)")
    parser.add_argument(
        "--steps", type=int, default=COMMON["steps"], metavar="N", help="number of steps of each run (default: 2000)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="number of runs at the same time (default: the number of cores)",
    )
    parser.add_argument("--device", default="cpu", help="device of the runs (default: cpu)")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("runs/collapse.jsonl"),
        metavar="FILE",
        help="file of the results (default: runs/collapse.jsonl)",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="directory to which the metrics and the certificate of each run are copied",
    )
    parser.add_argument(
        "--bases",
        type=Path,
        metavar="DIR",
        help="directory of the start models, which are kept (default: a temporary one)",
    )
    return parser


def wanted_runs(given: argparse.Namespace) -> dict[tuple[str, int], dict[str, object]]:
    """Return the options of each cell and seed that the command line asks for and that the results lack.

    Raises:
        SystemExit: the results have one of them with other options.
    """
    cells = given.cells or list(FULL if given.all else COST if given.cost else MAIN)
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    wanted = {(cell, seed): {**COMMON, "steps": given.steps, **CELLS[cell]} for seed in seeds for cell in cells}
    have = {(run["cell"], run["seed"]): run["options"] for run in read(given.results)}
    for key, options in wanted.items():
        if key in have and have[key] != options:
            sys.exit(
                f"{given.results}: expected {key[0]!r}, seed {key[1]}, with {options}, got {have[key]}: name another --results"
            )
    missing = {key: options for key, options in wanted.items() if key not in have}
    print(f"{len(wanted)} runs, {len(missing)} of them missing")
    return missing


def main() -> None:
    """Run every cell and seed that is missing in the results."""
    given = make_parser().parse_args()
    given.results.parent.mkdir(parents=True, exist_ok=True)
    missing = wanted_runs(given)
    lock, temporary = Lock(), tempfile.TemporaryDirectory()
    bases = given.bases or Path(temporary.name)
    bases.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name, seed in sorted({(str(options.get("base", "own")), seed) for (_, seed), options in missing.items()}):
        base_of(name, seed, bases)

    def one(key: tuple[str, int]) -> None:
        options = missing[key]
        base = base_of(str(options.get("base", "own")), key[1], bases)
        line = take(*key, options, given.device, base, given.keep)
        with lock, given.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        accuracy = line["curve"]["eval_accuracy"]
        print(
            f"{key[0]:28} seed {key[1]}  {accuracy[0]:.3f} -> best {max(accuracy):.3f} -> {accuracy[-1]:.3f}  {line['seconds']} s",
            flush=True,
        )

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(one, missing))


if __name__ == "__main__":
    main()
