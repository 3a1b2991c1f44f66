"""Record a committed result: run the benchmarks on idle cores, and write benchmarks/results/<machine>.json.

    python benchmarks/record.py                         every file, within 20 minutes on two cores
    python benchmarks/record.py --only bench_ema        one file again; the others stay as they are
    python benchmarks/record.py --rows float32          the rows that pytest's -k chooses, where the others would take hours

The result is written after each file, so that what was finished before an interruption is kept. Nothing is recorded of a machine that
is in use: before, between and after the files the processor time of all other processes is looked at for two seconds, and during a
file it is what the machine's account (/proc/stat) has beyond this process and its children. Where it is more than a tenth of a core,
the command waits a minute, then refuses; a file during which it was more is not recorded, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# What the pages need most comes first: a run that is cut has that.
FILES = (
    "bench_linear_token_stats",
    "bench_linear_policy_loss",
    "bench_kept_token_stats",
    "bench_real_rollouts",
    "bench_loss_of_real_rollouts",
    "bench_token_stats",
    "bench_logits_policy_loss",
    "bench_ema",
    "bench_policy_loss",
    "bench_iqr_filter",
    "bench_trainer",
    "bench_scaling",
)
LIMIT = 0.1  # cores that all other processes may use
LOOK, PATIENCE = 2.0, 60.0  # seconds
NOT_OF_A_FILE = ("device", "cpu", "cores", "threads", "torch", "peers", "python_version", "backend")


class BusyError(RuntimeError):
    """Other processes use the cores."""


def idle(look: float, patience: float) -> float:
    """Return how many cores others use once that is at most LIMIT; raise BusyError if it stays above it for `patience` seconds."""
    end = time.monotonic() + patience
    while True:
        before = machine.sample()
        time.sleep(look)
        used = machine.others(before, machine.sample())
        if used <= LIMIT:
            return used
        if time.monotonic() >= end:
            raise BusyError(f"other processes use {used:.2f} cores, allowed {LIMIT}: nothing is recorded")


def rounded(value: Any) -> Any:
    """Return a value with five significant digits, all through."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def trimmed(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a run of pytest-benchmark that came to an end, without its own statistics."""
    return [
        {"name": each["name"], "params": each["params"], "extra_info": rounded(each["extra_info"])}
        for each in data["benchmarks"]
        if each["extra_info"]
    ]


def text_of(result: dict[str, Any]) -> str:
    """Return the file's text, a row on each line."""
    head = json.dumps({key: value for key, value in result.items() if key != "benchmarks"}, indent=1)
    rows = ",\n".join(json.dumps(row) for row in result["benchmarks"])
    return f'{head[:-2]},\n "benchmarks": [\n{rows}\n]}}\n'


def run_file(name: str, choice: str, even_if_busy: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run a file of benchmarks; return its rows, and when and beside what they were taken."""
    load, start = os.getloadavg(), time.monotonic()
    before = 0.0 if even_if_busy else idle(LOOK, PATIENCE)
    # Compilation in this process: what its pool of processes uses could not be told from the use of others.
    settings = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "TRITON_INTERPRET": "0"}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "result.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            f"benchmarks/{name}.py",
            f"-k={choice}",
            "--benchmark-only",
            "-q",
            "-rs",
            "-p",
            "no:cacheprovider",
        ]
        account = machine.sample()
        done = subprocess.run([*command, f"--benchmark-json={place}"], cwd=ROOT, env=settings, check=False)
        during = machine.others(account, machine.sample())
        if done.returncode:
            raise RuntimeError(f"{name}: pytest ended with status {done.returncode}: nothing of it is recorded")
        rows = trimmed(json.loads(place.read_text(encoding="utf-8")))
    if during > LIMIT and not even_if_busy:
        raise BusyError(
            f"{name}: other processes used {during:.2f} cores meanwhile, allowed {LIMIT}: nothing of it is recorded"
        )
    return rows, {
        **({"rows": choice} if choice else {}),
        "date": machine.today(),
        "commit": machine.commit(),
        "seconds": round(time.monotonic() - start),
        "load_average_before": list(load),
        "load_average_after": list(os.getloadavg()),
        "cores_used_by_others": {"before": round(before, 3), "during": round(during, 3)},
    }


def merge(result: dict[str, Any], name: str, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Put the rows of a file in the place of those that the result has of it, the files in the order of FILES."""
    result["files"][name] = about
    every = [row for row in result["benchmarks"] if row["name"].partition("[")[0] != name] + rows
    result["benchmarks"] = sorted(every, key=lambda row: FILES.index(row["name"].partition("[")[0]))
    result["files"] = {each: result["files"][each] for each in FILES if each in result["files"]}


def begin(path: Path, here: dict[str, Any], small: bool, even_if_busy: bool) -> dict[str, Any]:
    """Return the result that is continued: that of `path`, or an empty one. Raise if it is of another machine or other versions."""
    kind = {"idle": not even_if_busy, "small": small}
    if not path.exists():
        return {"machine_info": here, **kind, "files": {}, "benchmarks": []}
    result = json.loads(path.read_text(encoding="utf-8"))
    for key in NOT_OF_A_FILE:
        if result["machine_info"].get(key) != here[key]:
            raise SystemExit(
                f"{path}: {key} was {result['machine_info'].get(key)!r}, is {here[key]!r}: delete it, or name another with --out"
            )
    if any(result.get(key) != value for key, value in kind.items()):
        raise SystemExit(f"{path}: its other files were taken with { ({k: result.get(k) for k in kind}) }, now {kind}")
    return result


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="FILE", choices=FILES, default=FILES, help="some of the files")
    parser.add_argument("--rows", default="", metavar="CHOICE", help="those that pytest's -k chooses; default: all")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>.json")
    parser.add_argument(
        "--even-if-busy", action="store_true", help="to try this command: the result is marked, and no page takes it"
    )
    options = parser.parse_args()
    here, small = machine.describe(), os.environ.get("MGRPO_BENCH_SMALL") == "1"
    if here["backend"] == "reference":
        raise SystemExit("the native backend is not built here (python -m mgrpo_kernels says why): nothing is recorded")
    path = options.out or RESULTS / f"{machine.slug(here)}.json"
    result = begin(path, here, small, options.even_if_busy)
    start, failed = time.monotonic(), []
    for name in options.only:
        try:
            rows, about = run_file(name, options.rows, options.even_if_busy)
            if not options.even_if_busy:
                about["cores_used_by_others"]["after"] = round(idle(LOOK, PATIENCE), 3)
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            failed.append(name)
            continue
        merge(result, name, rows, about)
        path.write_text(text_of(result), encoding="utf-8")
        print(
            f"{name}: {len(rows)} rows in {about['seconds']} s, {(time.monotonic() - start) / 60:.1f} minutes in all",
            flush=True,
        )
    missing = [name for name in FILES if name not in result["files"]]
    print(f"{path}: {len(result['benchmarks'])} rows; missing: {' '.join(missing) or 'none'}")
    if failed:
        print(f"again: python benchmarks/record.py --only {' '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
