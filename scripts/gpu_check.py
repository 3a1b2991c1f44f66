"""What `make gpu-check OUT=dir` does: the GPU's tests, the benchmarks that matter and the sweep of sizes, in under nine minutes.

    environment.json  device, versions, commit; copy bandwidth and matmul rate as measured now
    tests.json        each test of tests/gpu, with the text of failures and the figures that tests wrote down
    benchmarks.json   `pytest benchmarks/ --benchmark-only -m gpu_check`, for benchmarks/report.py
    tuning.json       `python benchmarks/tune.py`
    profile.json      with --profile: every kernel of one step of each op at full size
    summary.txt       the targets, each met or missed by how much; also printed
    log.txt           what the steps printed

Each step is a process of its own with its own time, and writes its file as soon as it has something: a crash, or the end of the
time, loses nothing that was measured. Nothing is installed: the interpreter that runs this has torch, triton, pytest,
pytest-benchmark and hypothesis. The commit is MGRPO_COMMIT's, that of a file COMMIT in the tree, or git's. The exit code is 1 when a
test failed or was lost in a crash.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MAIN_SHAPE = "qwen2.5-7b"
SECONDS = {"environment": 40.0, "tests": 200.0, "profile": 60.0, "benchmarks": 250.0, "tuning": 240.0}
RESERVE = 8.0  # seconds kept for the summary
LEAST = 12.0  # with less left, a step is not begun: imports alone take that long
# Those that compile longest first.
TESTS = (
    "policy_loss", "token_stats", "linear_policy_loss", "promises", "linear", "momentum_and_filter", "memory",
)  # fmt: skip
BENCHMARKS = (
    "linear_token_stats", "token_stats", "linear_policy_loss", "ema", "policy_loss", "iqr_filter", "logits_policy_loss",
)  # fmt: skip


class Finished(NamedTuple):
    """A process that is over."""

    code: int  # negative: a signal's
    cut_short: bool
    seconds: float
    text: str  # the end of what it printed


class Check:
    """A run: where it writes, and what time is left."""

    def __init__(self, out: Path, minutes: float, dry: bool) -> None:
        self.out, self.dry = out, dry
        self.begin = time.monotonic()
        self.deadline = self.begin + 60 * minutes - RESERVE
        self.notes: list[str] = []
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen[bytes]] = set()
        out.mkdir(parents=True, exist_ok=True)
        for name in (
            "environment.json",
            "tests.json",
            "benchmarks.json",
            "tuning.json",
            "profile.json",
            "summary.txt",
            "log.txt",
        ):
            (out / name).unlink(missing_ok=True)  # of an earlier run

    def stop(self, *_: object) -> None:
        """End at once, with what there is: for SIGTERM and Ctrl-C."""
        for process in list(self.running):  # each leads a session of its own, and would go on
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        self.notes.append("stopped from outside")
        self.write("summary.txt", summary(self))
        os._exit(1)

    def time_for(self, step: str) -> float | None:
        """Return how many seconds a step may take, None if it is dropped."""
        left = self.deadline - time.monotonic()
        if left < LEAST:
            self.note(f"{step}: dropped, no time left")
            return None
        if left < SECONDS[step]:
            self.note(f"{step}: shortened to {left:.0f} s of {SECONDS[step]:.0f}")
        return min(left, SECONDS[step])

    def note(self, text: str) -> None:
        """Put a line into the summary."""
        self.notes.append(text)
        print(text, flush=True)

    def write(self, name: str, content: Any) -> None:
        """Write a result in one go: a reader never sees half a file."""
        place = self.out / name
        new = place.with_suffix(".new")
        new.write_text(content if isinstance(content, str) else json.dumps(content, indent=1) + "\n", encoding="utf-8")
        new.replace(place)

    def read(self, name: str) -> dict[str, Any]:
        """Return a result, empty where there is none."""
        place = self.out / name
        return json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}

    def run(self, title: str, command: Sequence[object], seconds: float, **environment: str) -> Finished:
        """Run a process of this interpreter for at most `seconds`: then it is interrupted, so that it can still write, and killed."""
        begin, cut_short = time.monotonic(), False
        settings = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            **environment,
        }
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)], cwd=ROOT, env=settings, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            self.running.add(process)
            for patience, blow in ((seconds, signal.SIGINT), (15.0, signal.SIGKILL)):
                try:
                    process.wait(patience)
                    break
                except subprocess.TimeoutExpired:
                    cut_short = True
                    os.killpg(process.pid, blow)
            process.wait()
            self.running.discard(process)
            output.seek(0)
            text = output.read().decode(errors="replace")
        result = Finished(process.returncode, cut_short, round(time.monotonic() - begin, 1), text[-6000:])
        with self.lock, (self.out / "log.txt").open("a", encoding="utf-8") as log:
            log.write(
                f"==== {title}: code {result.code}{', cut short' if cut_short else ''}, {result.seconds} s\n{text[-200_000:]}\n"
            )
        return result


# Steps


def environment(check: Check) -> None:
    """Write environment.json."""
    if (seconds := check.time_for("environment")) is not None:
        done = check.run("environment", [__file__, "--only", "environment", "--out", check.out, *dry(check)], seconds)
        if done.code:
            check.note(f"environment: failed, see log.txt: {last_line(done.text)}")


def tests(check: Check) -> None:
    """Run each file of tests/gpu in a process of its own, several at a time (most of it is compiling), and write tests.json."""
    if (seconds := check.time_for("tests")) is None:
        return
    end = time.monotonic() + seconds
    files = [ROOT / "tests" / "gpu" / f"test_gpu_{name}.py" for name in TESTS]
    files += sorted(set((ROOT / "tests" / "gpu").glob("test_*.py")) - set(files))
    settings = (
        {"MGRPO_GPU_TESTS_ON": "cpu", "MGRPO_GPU_TESTS_EVERY": "16", "OMP_NUM_THREADS": "1"}
        if check.dry
        else {"MGRPO_GPU_TESTS_ON": "cuda"}
    )
    jobs = max(1, min(len(files), (os.cpu_count() or 1) // 2))
    if not check.dry:
        settings |= {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": str(max(2, (os.cpu_count() or 1) // jobs))}
    result: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "lost": [], "files": {}, "tests": []}

    def run(file: Path) -> None:
        log = Path(scratch) / f"{file.stem}.jsonl"
        command = ["-m", "pytest", file.relative_to(ROOT), "-q", "-p", "no:cacheprovider"]
        left = end - time.monotonic()
        done = Finished(-1, True, 0.0, "not begun: no time left")
        if left >= LEAST:
            done = check.run(file.name, command, left, **settings, MGRPO_GPU_TESTS_LOG=str(log))
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
        with check.lock:
            seen = [line for line in lines if "test" in line]
            collected = next((line["collected"] for line in lines if "collected" in line), [f"{file.name}: all of it"])
            result["lost"] += sorted(set(collected) - {line["test"] for line in seen})
            for outcome in ("passed", "failed", "skipped"):
                result[outcome] += sum(line["outcome"] == outcome for line in seen)
            result["files"][file.name] = done._asdict() | {"text": "" if done.code == 0 else done.text}
            result["tests"] += seen
            check.write("tests.json", result)

    with tempfile.TemporaryDirectory() as scratch, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, files))


def profile(check: Check) -> None:
    """Write profile.json."""
    if (seconds := check.time_for("profile")) is not None:
        done = check.run("profile", [__file__, "--only", "profile", "--out", check.out, *dry(check)], seconds)
        if done.code:
            check.note(f"profile: failed, see log.txt: {last_line(done.text)}")


def benchmarks(check: Check) -> None:
    """Run each file of benchmarks in a process of its own, what matters most first, and write benchmarks.json after each."""
    if (seconds := check.time_for("benchmarks")) is None:
        return
    end = time.monotonic() + seconds
    merged: dict[str, Any] = {"benchmarks": [], "files": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for name in BENCHMARKS:
            file, place = f"benchmarks/bench_{name}.py", Path(scratch) / f"{name}.json"
            left = end - time.monotonic()
            if left < LEAST:
                check.note(f"benchmarks: {name} dropped, no time left")
                continue
            # The main shape is too much for a CPU: there the others that the marker leaves out stand in.
            chosen = ["-k", "(ours or eager) and not float32"] if check.dry else ["-m", "gpu_check"]
            if name == "ema":  # its target names a peer that the marker leaves out
                chosen = ["-k", "ours or foreach"]
            settings = {"MGRPO_BENCH_SMALL": "1"} if check.dry else {"TRITON_INTERPRET": "0"}
            command = [
                "-m",
                "pytest",
                file,
                "--benchmark-only",
                f"--benchmark-json={place}",
                "-q",
                "-rs",
                "-p",
                "no:cacheprovider",
                *chosen,
            ]
            done = check.run(f"bench_{name}", command, left, **settings)
            merged["files"][name] = done._asdict() | {"text": done.text[-3000:]}
            if done.cut_short:
                check.note(f"benchmarks: {name} cut short after {done.seconds:.0f} s")
            elif done.code not in (0, 5):  # 5: nothing was selected
                check.note(f"benchmarks: {name} failed: {last_line(done.text)}")
            if place.exists() and place.stat().st_size:
                data = json.loads(place.read_text(encoding="utf-8"))
                merged = {**data, "benchmarks": merged["benchmarks"] + measured(data), "files": merged["files"]}
            check.write("benchmarks.json", merged)


def measured(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the benchmarks that came to an end, without each round's time."""
    for bench in data["benchmarks"]:
        bench.get("stats", {}).pop("data", None)
    return [bench for bench in data["benchmarks"] if "p50_ms" in bench["extra_info"]]


def tuning(check: Check) -> None:
    """Write tuning.json."""
    script = ROOT / "benchmarks" / "tune.py"
    if not script.exists():
        check.note("tuning: dropped, there is no benchmarks/tune.py")
        return
    if (seconds := check.time_for("tuning")) is None:
        return
    minutes = max(0.1, (seconds - 25) / 60)  # the field begun last is finished
    command = [
        script,
        "--out",
        check.out / "tuning.json",
        "--minutes",
        f"{minutes:.2f}",
        *(["--dry-run"] if check.dry else []),
    ]
    done = check.run("tuning", command, seconds, TRITON_INTERPRET="1" if check.dry else "0")
    if done.cut_short or done.code:
        check.note(f"tuning: {'cut short' if done.cut_short else 'failed'}: {last_line(done.text)}")


def dry(check: Check) -> list[str]:
    """Return the option that steps of this file are given."""
    return ["--dry-run-on-cpu"] if check.dry else []


def last_line(text: str) -> str:
    """Return the last line that says something."""
    return next((line.strip()[:160] for line in reversed(text.splitlines()) if line.strip()), "nothing was printed")


# What runs in a process of its own


def measure_environment(dry_run: bool) -> dict[str, Any]:
    """Return what environment.json holds."""
    import platform

    import torch
    import triton

    device = torch.device("cpu" if dry_run else "cuda")
    size, count = (256, 2**20) if dry_run else (8192, 2**30)

    def seconds(function: Callable[[], object]) -> float:
        times = []
        for _ in range(12):
            begin = time.perf_counter()
            if device.type == "cuda":
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                function()
                last.record()
                last.synchronize()
                times.append(first.elapsed_time(last) / 1e3)
            else:
                function()
                times.append(time.perf_counter() - begin)
        return statistics.median(times[2:])

    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    found = {
        "device": platform.processor() or "cpu", "capability": None, "multiprocessors": None, "memory_bytes": None, "driver": None,
        "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__, "python": platform.python_version(),
        "cpu_cores": os.cpu_count(), "commit": commit(), "copy_bytes_per_second": 2 * count / seconds(lambda: target.copy_(source)),
        "matmul_flop_per_second": 2 * size**3 / seconds(lambda: torch.mm(a, b, out=product)), "matmul": f"{size}^3 bfloat16",
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name, "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory, "driver": driver(),
        }  # fmt: skip
    return found


def driver() -> str | None:
    """Return the driver's version, None where nothing says it."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def commit() -> str | None:
    """Return the tree's commit, with a + if files differ from it; None where nothing says it."""
    if given := os.environ.get("MGRPO_COMMIT"):
        return given
    if (file := ROOT / "COMMIT").exists():
        return file.read_text(encoding="utf-8").strip() or None
    try:
        head, changed = (
            subprocess.run(
                ["git", *command], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


def measure_profile(dry_run: bool, write: Callable[[dict[str, Any]], None]) -> None:
    """Write the kernels of one step of each op, as many ops as come to an end."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]
    import torch
    from calls import CALLS, Sizes, device_work

    sizes = Sizes(16, 16, 300, 3, 100) if dry_run else Sizes(8192, 3584, 152064, 1000, 2**20)
    table: dict[str, Any] = {"sizes": sizes._asdict(), "ops": {}}
    for name, make in CALLS.items():
        try:
            call = make(sizes, torch.device("cpu" if dry_run else "cuda"))
            if dry_run:  # no device, no kernels: the step alone
                call.run()
                table["ops"][name] = []
            else:
                table["ops"][name] = [
                    {"kernel": kernel[:200], "count": count, "microseconds": round(time, 1)}
                    for kernel, (count, time) in device_work(call.run).items()
                ]
                del call
                torch.cuda.empty_cache()
        except Exception as error:  # one op's failure is an entry: the others still count
            table["ops"][name] = f"{type(error).__name__}: {error}"[:500]
        write(table)


# The summary


class Figures:
    """What the files say, under the names of the targets."""

    def __init__(self, check: Check) -> None:
        self.check = check
        self.tests = check.read("tests.json")
        self.rows: dict[tuple[str, str, str], dict[str, Any]] = {}
        for bench in check.read("benchmarks.json").get("benchmarks", []):
            params = bench["params"] or {}
            if params.get("dtype", "bfloat16") == "bfloat16" and (
                check.dry or params.get("shape", MAIN_SHAPE) == MAIN_SHAPE
            ):
                op = bench["name"].partition("[")[0].removeprefix("bench_")
                self.rows[op, params["provider"], params.get("step", "forward")] = bench["extra_info"]

    def share(self, op: str, step: str) -> float | None:
        """Return which share of its ceiling our op reaches."""
        row = self.rows.get((op, "ours", step))
        return None if row is None else row["share_of_ceiling"]

    def ceilings(self, op: str, step: str) -> float | None:
        """Return how many times its ceiling (as many bare matmuls as it has, say) our op takes."""
        share = self.share(op, step)
        return None if share is None else 1 / share

    def ahead(self, op: str, step: str, *peers: str) -> float | None:
        """Return how many times as long as ours the fastest of the providers takes whose names begin with one of `peers`.

        Ours was timed in the provider's own row, in turn with it, and computes what the provider computes.
        """
        ratios = [
            row["ratio_to_ours"]
            for (of, name, at), row in self.rows.items()
            if (of, at) == (op, step) and name.startswith(peers)
        ]
        return min(ratios, default=None)

    def of_test(self, test: str, figure: str, entry: str = "MiB") -> float | None:
        """Return the largest figure of that name that a test wrote down."""
        found = [
            each["figures"][figure][entry]
            for each in self.tests.get("tests", [])
            if test in each["test"] and figure in each["figures"]
        ]
        return max(found, default=None)

    def passed(self, *names: str) -> float | None:
        """Return the share of the tests with one of these names that passed; None if none ran."""
        ran = [
            each
            for each in self.tests.get("tests", [])
            if any(name in each["test"] for name in names) and each["outcome"] != "skipped"
        ]
        return sum(each["outcome"] == "passed" for each in ran) / len(ran) if ran else None


class Target(NamedTuple):
    """A line of the design's list for a GPU."""

    text: str
    figure: Callable[[Figures], float | None]
    at_least: bool
    goal: float
    unit: str = "x"  # or "%" of a share


HEAD_PEERS = ("trl", "verl", "cce", "torch")
TARGETS = (
    Target("from logits, forward: share of copy bandwidth", lambda f: f.share("token_stats", "forward"), True, 0.90, "%"),
    Target("from logits, backward: share of copy bandwidth", lambda f: f.share("token_stats", "backward"), True, 0.90, "%"),
    Target("from logits, forward: ahead of TRL", lambda f: f.ahead("token_stats", "forward", "trl"), True, 1.05),
    Target("from logits, forward: ahead of eager PyTorch", lambda f: f.ahead("token_stats", "forward", "eager"), True, 10.0),
    Target("from logits, backward: ahead of eager PyTorch", lambda f: f.ahead("token_stats", "backward", "eager"), True, 10.0),
    Target("head, forward: share of the bare matmul's rate", lambda f: f.share("linear_token_stats", "forward"), True, 0.85, "%"),
    Target("head, forward: the same, past Liger's", lambda f: f.share("linear_token_stats", "forward"), True, 0.92, "%"),
    Target("head, both: times four bare matmuls", lambda f: f.ceilings("linear_token_stats", "both"), False, 1.30),
    Target("head, both: the same, past Liger's", lambda f: f.ceilings("linear_token_stats", "both"), False, 1.10),
    Target("head, forward: ahead of verl, TRL, CCE, torch", lambda f: f.ahead("linear_token_stats", "forward", *HEAD_PEERS), True, 1.0),
    Target("head, both: ahead of verl, TRL, CCE, torch", lambda f: f.ahead("linear_token_stats", "both", *HEAD_PEERS), True, 1.0),
    Target("head, forward: workspace", lambda f: f.of_test("test_linear_token_stats", "workspace forward"), False, 512, "MiB"),
    Target("head, both: workspace", lambda f: f.of_test("test_linear_token_stats", "workspace forward and backward"), False, 512, "MiB"),
    Target("hidden to loss: times three bare matmuls", lambda f: f.ceilings("linear_policy_loss", "both"), False, 1.15),
    Target("hidden to loss: ahead of what needs four",
           lambda f: f.ahead("linear_policy_loss", "both", "ours, composed", "trl", "liger"), True, 1.0),
    Target("hidden to loss: workspace and accumulator", lambda f: f.of_test("test_linear_policy_loss", "workspace and accumulator"),
           False, 512 + 4 * 152064 * 3584 / 2**20, "MiB"),
    Target("momentum: share of copy bandwidth", lambda f: f.share("ema", "forward"), True, 0.90, "%"),
    Target("momentum: ahead of torch._foreach_lerp_", lambda f: f.ahead("ema", "forward", "foreach"), True, 1.0),
    Target("loss, filter, momentum: one launch", lambda f: f.passed("test_one_triton_kernel"), True, 1.0, "%"),
    Target("loss, filter: CUDA graphs", lambda f: f.passed("test_cuda_graph"), True, 1.0, "%"),
    Target("no host sync", lambda f: f.passed("test_no_host_sync"), True, 1.0, "%"),
)  # fmt: skip


def line(target: Target, figures: Figures) -> str:
    """Return a target's line: what was wanted, what was measured, met or missed by how much."""

    def written(value: float) -> str:
        return {"x": f"{value:.2f} x", "%": f"{100 * value:.1f} %", "MiB": f"{value:.0f} MiB"}[target.unit]

    value, sign = target.figure(figures), ">=" if target.at_least else "<="
    wanted = f"{sign} {written(target.goal)}"
    if value is None:
        return f"  {target.text:<50} {wanted:>13} {'-':>10}  not measured"
    met = value >= target.goal if target.at_least else value <= target.goal
    return f"  {target.text:<50} {wanted:>13} {written(value):>10}  {'met' if met else f'MISSED by {written(abs(value - target.goal))}'}"


def summary(check: Check) -> str:
    """Return one screen."""
    figures, found, ran = Figures(check), check.read("environment.json"), check.read("tests.json")
    lines = [
        f"gpu-check{' (dry run on a CPU: no figure here means anything)' if check.dry else ''}: {time.monotonic() - check.begin:.0f} s"
    ]
    if found:
        copy, matmul = found["copy_bytes_per_second"] / 1e12, found["matmul_flop_per_second"] / 1e12
        lines += [
            f"{found['device']}, driver {found['driver']}, commit {str(found['commit'])[:12]}",
            f"torch {found['torch']}, triton {found['triton']}, Python {found['python']}",
            f"copy {copy:.2f} TB/s, matmul {found['matmul']} {matmul:.0f} TFLOP/s",
        ]
    if ran:
        lines.append(
            f"tests: {ran['passed']} passed, {ran['failed']} failed, {ran['skipped']} skipped, {len(ran['lost'])} lost"
        )
        bad = [each for each in ran["tests"] if each["outcome"] == "failed"]
        lines += [f"  FAILED {each['test'].rpartition('/')[2]}: {reason(each['text'])}" for each in bad[:12]]
        lines += [f"  LOST {name.rpartition('/')[2]}" for name in ran["lost"][:6]]
        if len(bad) > 12 or len(ran["lost"]) > 6:
            lines.append("  ... all in tests.json")
    else:
        lines.append("tests: none ran")
    lines.append("targets:")
    lines += [line(target, figures) for target in TARGETS]
    chosen = check.read("tuning.json")
    if chosen:
        lines.append(
            f"tuning: {len(chosen['measured'])} fields measured, not reached: {', '.join(chosen['not_reached']) or 'none'}"
        )
    lines += check.notes
    return "\n".join(lines) + "\n"


def reason(text: str) -> str:
    """Return the line of a failure's text that says what went wrong."""
    errors = [each[1:].strip() for each in text.splitlines() if each.startswith("E ")]
    return (errors[0] if errors else last_line(text))[:150]


def main() -> int:
    """Run all steps, or one of this file's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"))
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="for everything; steps are shortened or dropped to keep it"
    )
    parser.add_argument("--profile", action="store_true", help="also write profile.json")
    parser.add_argument(
        "--dry-run-on-cpu", action="store_true", help="prove this script where there is no GPU, on tiny shapes"
    )
    parser.add_argument("--only", choices=["environment", "profile"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out, dry_run = arguments.out.resolve(), arguments.dry_run_on_cpu

    def write(name: str, content: Any) -> None:
        (out / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    if arguments.only == "environment":
        write("environment.json", measure_environment(dry_run))
        return 0
    if arguments.only == "profile":
        if dry_run:
            os.environ["TRITON_INTERPRET"] = "1"
        measure_profile(dry_run, lambda table: write("profile.json", table))
        return 0
    check = Check(out, arguments.minutes, dry_run)
    for stopped in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stopped, check.stop)
    steps = [environment, tests, *([profile] if arguments.profile else []), benchmarks, tuning]
    for step in steps:
        print(f"[{time.monotonic() - check.begin:4.0f} s] {step.__name__}", flush=True)
        step(check)
        check.write("summary.txt", summary(check))
    print(summary(check))
    ran = check.read("tests.json")
    return 0 if ran and ran["passed"] and not ran["failed"] and not ran["lost"] else 1


if __name__ == "__main__":
    sys.exit(main())
