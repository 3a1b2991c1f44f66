"""Mutation check: applies each one-line fault of tests/mutations/*.toml to a scratch copy and reports which ones the tests miss.

    make mutants                              every mutation, in two processes; writes tests/mutations/report.json and report.md
    make mutants ARGS="--only 'vote-*'"       mutations whose name matches; writes no report
    make mutants ARGS=--list                  names only

The selected tests run once on the unchanged copy first, and must pass. Then each mutation is one of

    killed    a test failed, or the process crashed or ran past its time limit
    survived  all selected tests passed: a test is missing
    stale     the text before the change no longer occurs exactly once in its file
    error     the mutant cannot be imported or compiled, or fails with an error that any test would find: replace it

The exit status is 0 only if every mutation was killed. Finished results are kept in build/mutants.json and used again while the
product, the tests, the mutation and the versions of the main packages are unchanged, so an interrupted run can be resumed.

C++ mutations rebuild only the changed objects, for one instruction set.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LISTS = "tests/mutations"
# Imported once for all tests of a copy; the package itself is imported anew for each.
PRELOADED = (
    "torch", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint", "triton", "numpy", "hypothesis",
    "xdist.plugin", "pytest_benchmark.plugin", "transformers", "transformers.models.qwen2", "trl.trainer.grpo_trainer",
)  # fmt: skip
PACKAGES = ("torch", "triton", "transformers", "trl", "pytest")
# What a mutant's result depends on, besides the list itself.
SOURCES = ("mgrpo_kernels", "csrc", "tests", "setup.py", "pyproject.toml", "benchmarks", "scripts", "examples")
LEFT_OUT = (LISTS, "benchmarks/results")
# Raised by code that cannot run at all: such a mutant shows nothing about the tests.
BROKEN = {
    "SyntaxError",
    "IndentationError",
    "ImportError",
    "ModuleNotFoundError",
    "NameError",
    "UnboundLocalError",
    "AttributeError",
}


class Mutation(NamedTuple):
    """One fault: `before`, which must occur exactly once in `file`, becomes `after`; `tests` are pytest's arguments."""

    name: str
    file: str
    before: str
    after: str
    tests: str
    why: str

    @property
    def native(self) -> bool:
        """Return whether the extension must be rebuilt."""
        return self.file.startswith("csrc/")


class Result(NamedTuple):
    """What became of a mutation, and by what: the test that failed, the signal, the reason."""

    outcome: str
    by: str


def load(root: Path) -> list[Mutation]:
    """Return all mutations of the lists, sorted by name.

    Raises:
        ValueError: two of the same name, or one that changes nothing.
    """
    mutations = []
    for path in sorted((root / LISTS).glob("*.toml")):
        mutations += [Mutation(**entry) for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]]
    names = [mutation.name for mutation in mutations]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"mutations: expected different names, got twice: {', '.join(repeated)}")
    if same := [mutation.name for mutation in mutations if mutation.before == mutation.after]:
        raise ValueError(f"mutations: expected a change, got none in {', '.join(same)}")
    return sorted(mutations)


def tracked(root: Path) -> list[str]:
    """Return the files that git tracks, as they are in the working tree."""
    command = ["git", "ls-files", "-z"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(name for name in set(names) if name and (root / name).is_file())


def digest_of(root: Path) -> str:
    """Return a digest of everything that a result depends on, besides its mutation."""
    digest = hashlib.sha256(json.dumps(versions()).encode())
    for name in tracked(root):
        if name.startswith(SOURCES) and not name.startswith(LEFT_OUT):
            digest.update(name.encode() + b"\0" + (root / name).read_bytes() + b"\0")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide how the tests behave."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


class Copy:
    """A scratch copy of the tree, with the extension that was built in place, where one mutation at a time is applied and tested."""

    def __init__(self, root: Path, place: Path, seconds: float) -> None:
        self.root, self.place, self.seconds = root, place, seconds
        for name in tracked(root):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, place / name)
        for path in root.glob("mgrpo_kernels/_C*.so"):
            shutil.copy2(path, place / "mgrpo_kernels")
        self.baselines: dict[str, Result] = {}
        self.worker: subprocess.Popen[str] | None = None
        where = (
            self.process(sys.executable, "-c", "import mgrpo_kernels; print(mgrpo_kernels.__file__)")
            .communicate()[0]
            .strip()
        )
        if not Path(where.splitlines()[-1]).resolve().is_relative_to(place.resolve()):
            raise RuntimeError(f"mutants: expected tests to import the package from {place}, got {where}")

    def process(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command in the copy, with the copy's package."""
        settings = {
            **os.environ, "PYTHONPATH": str(self.place), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
            "COLUMNS": "240",  # pytest shortens messages to the width of the terminal
            **environment,
        }  # fmt: skip
        return subprocess.Popen(
            command, cwd=self.place, env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace",
        )  # fmt: skip

    def ask(self, *arguments: str) -> tuple[int | None, str]:
        """Run pytest in the copy; return its exit status, None past the time limit, and what it printed."""
        if self.worker is None:
            command = (sys.executable, str(Path(__file__).with_name("mutants_worker.py")), *PRELOADED)
            self.worker = self.process(*command, TRITON_INTERPRET="1")  # triton reads it when it is imported
        assert self.worker.stdin is not None
        assert self.worker.stdout is not None
        output = self.place / ".output"
        self.worker.stdin.write(json.dumps([arguments, str(output)]) + "\n")
        self.worker.stdin.flush()
        replies = self.worker.stdout
        while not (line := replies.readline()).strip().isdecimal():  # libraries print warnings while they are imported
            if not line:
                raise RuntimeError("mutants: the process that runs the tests has ended")
        pid, late = int(line), threading.Event()

        def kill(reason: threading.Event | None = None) -> None:
            if reason is not None:
                reason.set()
            with contextlib.suppress(ProcessLookupError):  # its children too, which may hang as well
                os.killpg(pid, signal.SIGKILL)

        timer = threading.Timer(self.seconds, kill, (late,))
        timer.start()
        code = int(replies.readline())
        timer.cancel()
        kill()
        return None if late.is_set() else code, output.read_text(encoding="utf-8", errors="replace")

    def test(self, tests: str) -> Result:
        """Run the selected tests until one fails."""
        code, text = self.ask("-x", "-q", "-p", "no:cacheprovider", "--tb=line", *shlex.split(tests))
        if code == 0:
            passed = re.search(r"\b(\d+) passed", text)
            return (
                Result("survived", "all selected tests passed") if passed else Result("error", "no selected test ran")
            )
        if code is None:
            return Result("killed", "timeout")
        if code < 0 or code > 128:
            return Result("killed", f"crash: signal {-code if code < 0 else code - 128}")
        failed = re.search(r"^(?:FAILED|ERROR) (\S+?(?:\[.*?\])?)(?: - (.*))?$", text, re.MULTILINE)
        if code != 1 or failed is None:
            return Result("error", f"pytest ended with status {code}: {''.join(text.strip().splitlines()[-1:])}")
        message = (failed[2] or "").replace(str(self.place), ".")
        broken = message.partition(":")[0].rpartition(".")[2] in BROKEN
        return Result("error" if broken else "killed", f"{failed[1]} - {message}"[:160].strip(" -"))

    def baseline(self, tests: str) -> Result:
        """Return the result of the selected tests without any mutation, which must be that they pass."""
        if tests not in self.baselines:
            self.baselines[tests] = self.test(tests)
        return self.baselines[tests]

    def judge(self, mutation: Mutation) -> Result:
        """Apply a mutation, run its tests and undo it."""
        path = self.place / mutation.file
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if (times := text.count(mutation.before)) != 1:
            return Result("stale", f"the text before the change occurs {times} times in {mutation.file}")
        if (unchanged := self.baseline(mutation.tests)).outcome != "survived":
            return Result("error", f"without the mutation: {unchanged.by}")
        path.write_text(text.replace(mutation.before, mutation.after), encoding="utf-8")
        try:
            if problem := self.rebuild(mutation):
                return Result("error", problem)
            return self.test(mutation.tests)
        finally:
            path.write_text(text, encoding="utf-8")

    def close(self) -> None:
        """End the process that runs the tests."""
        if self.worker is not None:
            self.worker.kill()
            self.worker.communicate()

    def rebuild(self, mutation: Mutation) -> str:
        """Return why the mutant cannot be built, empty if it can: Python needs no build."""
        return "this copy has no build of its own" if mutation.native else ""


class NativeCopy(Copy):
    """A copy that builds the extension for one instruction set, and rebuilds what a mutation changes."""

    def __init__(self, root: Path, place: Path, seconds: float) -> None:
        super().__init__(root, place, seconds)
        if problem := self.build():
            raise RuntimeError(f"mutants: the extension cannot be built in {place}: {problem}")
        # ninja compares times: each rebuild starts from this state, so that it compiles the mutated file and nothing else.
        self.built = place.with_name(place.name + "-built")
        shutil.rmtree(self.built, ignore_errors=True)
        shutil.copytree(place / "build", self.built)

    def build(self) -> str:
        """Build what has changed; return why it cannot be built, empty if it can."""
        process = self.process(
            sys.executable, "setup.py", "build_ext", "--inplace", MGRPO_REQUIRE_NATIVE="1", MGRPO_ISAS="DEFAULT", MAX_JOBS="1",
        )  # fmt: skip
        text = process.communicate()[0]
        if process.returncode == 0:
            return ""
        errors = [line for line in text.splitlines() if "error" in line.lower()] or [text[-300:]]
        return f"does not compile: {errors[0]}".replace(str(self.place), ".")[:300]

    def judge(self, mutation: Mutation) -> Result:
        """Apply a mutation, run its tests and undo it, the file's time included."""
        path = self.place / mutation.file
        times = path.stat() if path.exists() else None
        try:
            return super().judge(mutation)
        finally:
            if times is not None:
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def rebuild(self, mutation: Mutation) -> str:
        """Build the mutated file from the state after the first build."""
        shutil.rmtree(self.place / "build")
        shutil.copytree(self.built, self.place / "build")
        return self.build()


class Check:
    """A run over mutations: two threads, each with copies of its own, and what is known from earlier runs."""

    def __init__(self, root: Path, mutations: list[Mutation], scratch: Path, seconds: float, fresh: bool) -> None:
        self.root, self.scratch, self.seconds = root, scratch, seconds
        self.kept = root / "build" / "mutants.json"
        self.tree = digest_of(root)
        known = json.loads(self.kept.read_text(encoding="utf-8")) if self.kept.exists() and not fresh else {}
        self.results = {m.name: Result(*known[self.key(m)]) for m in mutations if self.key(m) in known}
        self.known: dict[str, list[str]] = known
        self.waiting = [m for m in mutations if m.name not in self.results]
        self.total = len(mutations)
        self.lock = threading.Lock()
        self.problem: BaseException | None = None

    def key(self, mutation: Mutation) -> str:
        """Return what a kept result is found by."""
        return hashlib.sha256(json.dumps([self.tree, *mutation]).encode()).hexdigest()

    def next(self, native: bool) -> Mutation | None:
        """Take a waiting mutation: a C++ one if `native` and there is any."""
        with self.lock:
            if self.problem is not None:
                return None
            order = sorted(self.waiting, key=lambda m: (m.native != native, m.tests, m.name))
            found = next((m for m in order if native or not m.native), None)
            if found is not None:
                self.waiting.remove(found)
            return found

    def work(self, number: int) -> None:
        """Judge mutations until none waits. The first thread takes those in C++ too: one build serves them all."""
        copies: dict[bool, Copy] = {}
        try:
            while (mutation := self.next(native=number == 0)) is not None:
                if mutation.native not in copies:
                    kind = NativeCopy if mutation.native else Copy
                    copies[mutation.native] = kind(self.root, self.scratch / f"{kind.__name__}-{number}", self.seconds)
                begin = time.monotonic()
                self.note(mutation, copies[mutation.native].judge(mutation), time.monotonic() - begin)
        except BaseException as error:
            self.problem = error
        finally:
            for each in copies.values():
                each.close()

    def note(self, mutation: Mutation, result: Result, seconds: float) -> None:
        """Keep a result, and print it."""
        with self.lock:
            self.results[mutation.name] = result
            if not result.by.startswith("without the mutation"):
                self.known[self.key(mutation)] = list(result)
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            new = self.kept.with_suffix(".new")
            new.write_text(json.dumps(self.known), encoding="utf-8")
            new.replace(self.kept)
            count = f"{len(self.results)}/{self.total}"
            print(f"{count:>8} {result.outcome:8} {mutation.name}: {result.by} ({seconds:.0f} s)", flush=True)

    def run(self, jobs: int) -> dict[str, Result]:
        """Return the result of every mutation, by name.

        Raises:
            RuntimeError: a copy could not be made.
        """
        threads = [threading.Thread(target=self.work, args=(number,), daemon=True) for number in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.problem is not None:
            raise RuntimeError("mutants: stopped") from self.problem
        return self.results


def write_report(root: Path, mutations: list[Mutation], results: dict[str, Result]) -> None:
    """Write report.json, and report.md for readers."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", *SOURCES], cwd=root, capture_output=True, text=True, check=False
    )
    lines = [line for line in changed.stdout.splitlines() if not line[3:].startswith(LEFT_OUT)]
    counts = {
        outcome: sum(r.outcome == outcome for r in results.values())
        for outcome in ("killed", "survived", "stale", "error")
    }
    rows = [
        {"name": m.name, "file": m.file, "outcome": results[m.name].outcome, "by": results[m.name].by} for m in mutations
    ]  # fmt: skip
    report: dict[str, Any] = {
        "commit": commit + (" with uncommitted changes" if lines else ""),
        "versions": versions(),
        "counts": counts,
        "mutations": rows,
    }
    place = root / LISTS
    (place / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (place / "report.md").write_text(page(report, mutations), encoding="utf-8")


def page(report: dict[str, Any], mutations: list[Mutation]) -> str:
    """Return the report as a page."""
    reasons = {mutation.name: mutation.why for mutation in mutations}
    counts = ", ".join(f"{number} {outcome}" for outcome, number in report["counts"].items())
    named = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "# Mutation check", "", f"{counts}. Commit {report['commit']}; {named}.", "",
        "`make mutants` writes this page. CONTRIBUTING.md says how to add a mutation.", "",
        "| mutation | file | fault | outcome | by |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in report["mutations"]:
        cells = [row["name"], f"`{row['file']}`", reasons[row["name"]], row["outcome"], row["by"].partition(" - ")[0]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the check; return the exit status."""
    parser = argparse.ArgumentParser(
        description="Apply each mutation to a scratch copy and report those that no test catches."
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="PATTERN",
        help="names of mutations to run, as shell patterns; writes no report",
    )
    parser.add_argument("--list", action="store_true", help="print the names of all mutations and stop")
    parser.add_argument("--jobs", type=int, default=2, help="number of mutations tested at once (default: 2)")
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds for the tests of one mutation (default: 300)"
    )
    parser.add_argument("--fresh", action="store_true", help="ignore the results of earlier runs")
    parser.add_argument(
        "--scratch",
        type=Path,
        help="directory for the scratch copies, kept for the next run (default: a temporary one)",
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to test (default: this one)")
    options = parser.parse_args(arguments)
    mutations = load(options.root)
    if options.only:
        mutations = [m for m in mutations if any(fnmatch.fnmatchcase(m.name, pattern) for pattern in options.only)]
        if not mutations:
            parser.error(f"--only: no mutation matches {', '.join(options.only)}")
    if options.list:
        print("\n".join(m.name for m in mutations))
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        scratch = options.scratch or Path(temporary)
        results = Check(options.root, mutations, scratch, options.timeout, options.fresh).run(options.jobs)
    if not options.only:
        write_report(options.root, mutations, results)
    bad = {name: result for name, result in sorted(results.items()) if result.outcome != "killed"}
    for name, result in bad.items():
        print(f"{result.outcome}: {name}: {result.by}")
    print(f"{len(results) - len(bad)} of {len(results)} mutations killed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
