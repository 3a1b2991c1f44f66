"""What is run, by worth: what a later stage would tell is worth less than what an earlier one tells, so a cut-off costs least."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from gpu_check import results, rows
from gpu_check.summary import MAIN_SHAPE, summary
from gpu_check.supervisor import Finished, Supervisor, last_line

SCRIPTS = Path(__file__).resolve().parents[1]
ROOT = SCRIPTS.parent
RESERVE = 8.0  # seconds kept for the summary
LEAST = 12.0  # with less left, a stage is not begun: imports alone take that long
REFRESH = 2.0  # seconds between two versions of the summary
ROW_SECONDS = {"environment": 30.0, "smoke": 30.0, "tests": 60.0, "benchmarks": 60.0, "tuning": 45.0, "profile": 30.0}
FILE_SECONDS = 120.0  # for one file of tests or benchmarks
PATIENCE_ON_CPU = 6.0  # times as long for a row in Triton's interpreter, on a machine that others use as well
SMOKE = "smoke"
# Those that compile longest first.
TESTS = (
    "policy_loss",
    "token_stats",
    "linear_policy_loss",
    "promises",
    "linear",
    "momentum_and_filter",
    "memory",
)
HEAD = "linear_token_stats"
OTHER_BENCHMARKS = (
    "token_stats",
    "gradient_tolerance",
    "linear_policy_loss",
    "ema",
    HEAD,
    "policy_loss",
    "iqr_filter",
    "logits_policy_loss",
)
PROVIDERS = ("ours", "eager", "compile", "trl", "liger", "verl", "cce", "torch", "quack", "flash-attn")
# Names as in mgrpo_kernels/ops/_triton/tuning.py; the decisions that matter most.
HEAD_TILE, OWN_MATMUL = ("forward_tile",), ("fused_tile", "matmul")


class Check:
    """A check: the folder it writes to, and what time is left."""

    def __init__(self, out: Path, minutes: float, dry: bool, path: Sequence[Path] = ()) -> None:
        self.out, self.dry, self.log = out, dry, out / "rows.jsonl"
        self.begin = time.monotonic()
        self.deadline = self.begin + 60 * minutes - RESERVE
        self.notes: list[str] = []
        self.waiting: list[str] = []  # the stages that have not begun
        self.lock = threading.Lock()
        self.refreshed = self.begin
        out.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.json", "*.jsonl", "*.new", "summary.txt", "log.txt"):
            for earlier in out.glob(pattern):
                earlier.unlink()
        self.environment = {
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), str(SCRIPTS), *map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]
            )
        }
        self.supervisor = Supervisor(self.log, ROOT, tick=self.tick, record=self.record)

    def record(self, title: str, text: str) -> None:
        """Keep what a process printed."""
        with self.lock, (self.out / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"==== {title}\n{text[-100_000:]}\n")

    def note(self, text: str) -> None:
        """Put a line into the summary."""
        self.notes.append(text)
        print(text, flush=True)

    def tick(self) -> None:
        """Bring the summary up to date, now and then: whatever ends this process, the last one is a few seconds old."""
        due = time.monotonic() - self.refreshed > REFRESH and not self.supervisor.stopping
        if due and self.lock.acquire(blocking=False):
            try:
                self.refresh()
            finally:
                self.lock.release()

    def refresh(self) -> str:
        """Write the JSON files and the summary of what has finished so far. A fault here must not end the check: rows.jsonl has it all."""
        try:
            runs = results.write_all(self.out)
            text = summary(self.out, runs, seconds=time.monotonic() - self.begin, notes=self.notes, dry=self.dry)
        except Exception as error:
            why = f"rows.jsonl could not be summarised: {type(error).__name__}: {error}"
            text = "\n".join([why, *self.notes]) + "\n"
        results.write(self.out / "summary.txt", text)
        self.refreshed = time.monotonic()
        return text

    def stop(self, number: int, _: object) -> None:
        """End at once, with what there is: the handler of SIGTERM, SIGINT and SIGHUP."""
        self.supervisor.stop()
        self.lock.acquire(timeout=1)  # of another thread's version of the summary; this thread's own is lost
        why = f"stopped by {signal.Signals(number).name}"
        self.notes.append(why + (f" before these stages: {', '.join(self.waiting)}" if self.waiting else ""))
        with contextlib.suppress(OSError):  # a full disk, say: the process still ends
            for run in rows.read(self.log).values():
                for row in run.begun:
                    if row not in run.rows:
                        rows.append(
                            self.log, {"run": run.name, "row": row, "outcome": "cut off", "text": f"cut off: {why}"}
                        )
                rows.append(self.log, {"run": run.name, "end": {"reason": why}})
            print(self.refresh(), flush=True)
            for half in self.out.glob("*.new"):  # what another thread was writing
                half.unlink()
        os._exit(1)

    def left(self) -> float:
        """Return the seconds until the check must end."""
        return self.deadline - time.monotonic()

    def row_seconds(self, kind: str) -> float:
        """Return the seconds after which a row without a result is killed."""
        return ROW_SECONDS[kind] * (PATIENCE_ON_CPU if self.dry else 1.0)

    def run(self, run: str, command: Sequence[object], kind: str, seconds: float, **environment: str) -> Finished:
        """Run a file's rows for at most `seconds`, and mention what went wrong with the file as a whole."""
        done = self.supervisor.run(
            run,
            command,
            seconds=min(seconds, self.left()),
            row_seconds=self.row_seconds(kind),
            environment=self.environment | environment,
        )
        reason = done.reason
        if not reason and run not in rows.read(self.log):
            reason = "its process wrote no row"
        elif not reason and not rows.read(self.log)[run].begun:
            reason = "no row was selected"
        if reason:
            print(f"{run}: {reason}", flush=True)
        if reason != done.reason:
            rows.append(self.log, {"run": run, "end": {"reason": reason}})
        return done._replace(reason=reason)

    def drop(self, run: str) -> None:
        """Record that a run was not begun."""
        rows.append(self.out / "rows.jsonl", {"run": run, "end": {"reason": "not begun: no time left"}})


# The stages. Each takes the check and its seconds.


def environment(check: Check, seconds: float) -> None:
    """Measure what the other figures are compared with."""
    command = ["-m", "gpu_check.measure", results.ENVIRONMENT, *(["--on-cpu"] if check.dry else [])]
    done = check.run(results.ENVIRONMENT, command, "environment", seconds)
    failed = [row for row in rows.read(check.log)[results.ENVIRONMENT].rows.values() if row["outcome"] != "passed"]
    for row in failed:
        check.note(f"environment: {row['row']} {row['outcome']}: {last_line(row['text'])}")
    if not done.reason and not failed:
        print("\n".join(check.refresh().splitlines()[1:5]), flush=True)


def pytest_of(check: Check, file: str, kind: str) -> list[str]:
    """Return the command that runs the rows of a file. Shortly before a row is killed, it prints where it hangs."""
    stacks = f"faulthandler_timeout={0.8 * check.row_seconds(kind)}"
    return ["-m", "pytest", file, "-q", "-rs", "-p", "no:cacheprovider", "-p", "gpu_check.recorder", "-o", stacks]


def settings_of_tests(check: Check, processes: int) -> dict[str, str]:
    """Return the environment of a file of tests, of which several processes share the CPU."""
    if check.dry:
        return {"MGRPO_GPU_TESTS_ON": "cpu", "MGRPO_GPU_TESTS_EVERY": "16", "OMP_NUM_THREADS": "1"}
    threads = max(2, (os.cpu_count() or 1) // processes)
    return {"MGRPO_GPU_TESTS_ON": "cuda", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": str(threads)}


def smoke(check: Check, seconds: float) -> None:
    """Launch each kernel once or twice. Where none works, nothing else is run."""
    file = f"tests/gpu/test_gpu_{SMOKE}.py"
    done = check.run(file, pytest_of(check, file, "smoke"), "smoke", seconds, **settings_of_tests(check, 1))
    run = rows.read(check.log).get(file, rows.Run(file))
    for row in run.rows.values():
        if row["outcome"] not in ("passed", "skipped"):
            print(f"smoke: {row['row'].rpartition('::')[2]} {row['outcome']}: {_why(row['text'])}", flush=True)
    bad = [row for row in run.rows.values() if row["outcome"] in ("failed", "crashed")]
    if bad and len(bad) == len(run.rows) and not run.not_finished:
        raise NothingWorksError("every smoke test failed")
    if not run.rows and done.cannot_start:  # the tests cannot be imported; slow or cut off is another matter
        raise NothingWorksError(done.reason)


class NothingWorksError(Exception):
    """No kernel works on this machine."""


def _why(text: str) -> str:
    return next((line[1:].strip() for line in text.splitlines() if line.startswith("E ")), last_line(text))[:200]


def tests(check: Check, seconds: float) -> None:
    """Run each file of tests/gpu in processes of its own, several files at a time: most of it is compiling."""
    end = time.monotonic() + seconds
    folder = ROOT / "tests" / "gpu"
    files = [folder / f"test_gpu_{name}.py" for name in TESTS]
    files += sorted(set(folder.glob("test_*.py")) - set(files) - {folder / f"test_gpu_{SMOKE}.py"})
    files = [file for file in files if file.exists()]
    jobs = max(1, min(len(files), (os.cpu_count() or 1) // 2))

    def run(file: Path) -> None:
        name = str(file.relative_to(ROOT))
        left = min(end - time.monotonic(), check.left())
        if left < LEAST:
            check.drop(name)
        else:
            check.run(
                name,
                pytest_of(check, name, "tests"),
                "tests",
                min(left, _file_seconds(check)),
                **settings_of_tests(check, jobs),
            )

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, files))


def _file_seconds(check: Check) -> float:
    return FILE_SECONDS * (PATIENCE_ON_CPU if check.dry else 1.0)


def benchmarks(check: Check, names: Sequence[str], chosen: Sequence[str], seconds: float) -> None:
    """Run files of benchmarks one after another, the rows of our own ops first."""
    end = time.monotonic() + seconds
    for name in names:
        file = f"benchmarks/bench_{name}.py"
        left = min(end - time.monotonic(), check.left())
        if left < LEAST:
            check.drop(file)
            continue
        # The main shape is too much for a CPU: there the others, which the marker leaves out, stand in.
        select = ["-k", "(ours or eager) and not float32"] if check.dry else list(chosen)
        if name == "ema":  # its target names a peer that the marker leaves out
            select = ["-k", "ours or foreach"]
        settings = {"MGRPO_BENCH_SMALL": "1"} if check.dry else {"TRITON_INTERPRET": "0"}
        check.run(
            file,
            [*pytest_of(check, file, "benchmarks"), "--benchmark-only", *select],
            "benchmarks",
            min(left, _file_seconds(check)),
            GPU_CHECK_FIRST=",".join(f"-{name}-" for name in PROVIDERS),
            **settings,
        )


def head_benchmarks(check: Check, seconds: float) -> None:
    """The fused head beside eager PyTorch, torch.compile and every peer, at the main shape."""
    benchmarks(check, [HEAD], ["-k", f"{MAIN_SHAPE}-bfloat16"], seconds)


def other_benchmarks(check: Check, seconds: float) -> None:
    """Every op beside its peers, and what remains of the head."""
    benchmarks(check, OTHER_BENCHMARKS, ["-m", "gpu_check"], seconds)


def tuning(check: Check, fields: Sequence[str], seconds: float) -> None:
    """Sweep some fields, or with none all that remain."""
    command = ["benchmarks/tune.py", "--worker", "--out", check.out / "tuning.json"]
    command += ["--only", *fields] if fields else []
    command += ["--dry-run"] if check.dry else []
    check.run(results.TUNING, command, "tuning", seconds, TRITON_INTERPRET="1" if check.dry else "0")


def profile(check: Check, seconds: float) -> None:
    """Record the kernels of one step of each op."""
    check.run(
        results.PROFILE,
        ["-m", "gpu_check.measure", "profile", *(["--on-cpu"] if check.dry else [])],
        "profile",
        seconds,
    )


class Stage(NamedTuple):
    """A part of a check; what a stage leaves of its seconds, later ones have."""

    title: str
    seconds: float
    do: Callable[[Check, float], None]
    runs: tuple[str, ...]  # for the summary, where a stage is dropped


STAGES = (
    Stage("environment", 40, environment, (results.ENVIRONMENT,)),
    Stage("smoke tests", 75, smoke, (f"tests/gpu/test_gpu_{SMOKE}.py",)),
    Stage("head benchmarks", 140, head_benchmarks, (f"benchmarks/bench_{HEAD}.py",)),
    Stage("forward_tile", 50, lambda check, seconds: tuning(check, HEAD_TILE, seconds), ("forward_tile",)),
    Stage("fused_tile and matmul", 70, lambda check, seconds: tuning(check, OWN_MATMUL, seconds), OWN_MATMUL),
    Stage("tests", 150, tests, tuple(f"tests/gpu/test_gpu_{name}.py" for name in TESTS)),
    Stage("profile", 60, profile, (results.PROFILE,)),
    Stage("other sizes", 90, lambda check, seconds: tuning(check, (), seconds), ("the other sizes",)),
    Stage("other benchmarks", 240, other_benchmarks, tuple(f"benchmarks/bench_{name}.py" for name in OTHER_BENCHMARKS)),
)


def run_stages(check: Check, stages: Sequence[Stage]) -> None:
    """Run the stages in order, each in its own time or in what is left; the summary is new after each."""
    for i, stage in enumerate(stages):
        check.waiting = [each.title for each in stages[i + 1 :]]
        seconds = min(stage.seconds * (PATIENCE_ON_CPU if check.dry else 1.0), check.left())
        if seconds < LEAST:
            check.note(f"{stage.title}: dropped, no time left")
            for run in stage.runs:
                check.drop(run)
            continue
        print(f"[{time.monotonic() - check.begin:4.0f} s] {stage.title}", flush=True)
        try:
            stage.do(check, seconds)
        except NothingWorksError as error:
            check.note(
                f"stopped after the smoke tests, none of which passed: {error}; not begun: {', '.join(check.waiting)}"
            )
            break
        except Exception as error:  # a fault of this script must not cost the stages after it
            check.note(f"{stage.title}: this script failed: {type(error).__name__}: {error}")
        with check.lock:
            check.refresh()
