"""Mutation check: applies each one-line fault of tests/mutations/*.toml to a scratch copy and reports which ones the tests miss.

    make mutants                              every mutation, in two processes; writes tests/mutations/report.json and report.md
    make mutants ARGS="--only 'vote-*'"       mutations whose name matches; writes no report
    make mutants ARGS="--only 'vote-*' --update"   the same, and renews their rows of the report; each row names its commit
    make mutants ARGS=--list                  names only

The selected tests run once on the unchanged copy first, and must pass. Then each mutation is one of

    killed    a test failed, or the process crashed or ran past its time limit
    survived  all selected tests passed: a test is missing
    stale     the text before the change no longer occurs exactly once in its file
    error     the mutant cannot be imported or compiled, or fails with an error that any test would find: replace it

The exit status is 0 only if every mutation was killed. Finished results are kept in build/mutants.json and used again while the
product, the selected test files, what tests share, the mutation and the versions of the main packages are unchanged, so an interrupted
run can be resumed.

C++ mutations rebuild only the changed objects, for one instruction set.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

from mutants_copies import Copy, Mutation, NativeCopy, Result, tracked

ROOT = Path(__file__).resolve().parents[1]
LISTS = "tests/mutations"
PACKAGES = ("torch", "triton", "transformers", "trl", "pytest")
# What a mutant's result depends on, besides the list itself.
SOURCES = ("mgrpo_kernels", "csrc", "tests", "setup.py", "pyproject.toml", "benchmarks", "scripts", "examples")
LEFT_OUT = (LISTS, "benchmarks/results", "examples/collapse/results", "scripts/mutants.py")


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


def digest_of(root: Path, tests: str) -> str:
    """Return a digest of everything that a result depends on, besides its mutation: of the test files, those that `tests` names."""
    digest = hashlib.sha256(json.dumps(versions()).encode())
    for name in tracked(root):
        other_test = fnmatch.fnmatch(name, "tests/*test_*.py") and name not in tests
        if name.startswith(SOURCES) and not name.startswith(LEFT_OUT) and not other_test:
            digest.update(name.encode() + b"\0" + (root / name).read_bytes() + b"\0")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide how the tests behave."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


class Check:
    """A run over mutations: two threads, each with copies of its own, and what is known from earlier runs."""

    def __init__(self, root: Path, mutations: list[Mutation], scratch: Path, seconds: float, fresh: bool) -> None:
        self.root, self.scratch, self.seconds = root, scratch, seconds
        self.kept = root / "build" / "mutants.json"
        self.trees = {tests: digest_of(root, tests) for tests in {mutation.tests for mutation in mutations}}
        known = json.loads(self.kept.read_text(encoding="utf-8")) if self.kept.exists() and not fresh else {}
        self.results = {m.name: Result(*known[self.key(m)]) for m in mutations if self.key(m) in known}
        self.known: dict[str, list[str]] = known
        self.waiting = [m for m in mutations if m.name not in self.results]
        self.total = len(mutations)
        self.lock = threading.Lock()
        self.problem: BaseException | None = None

    def key(self, mutation: Mutation) -> str:
        """Return what a kept result is found by."""
        return hashlib.sha256(json.dumps([self.trees[mutation.tests], *mutation]).encode()).hexdigest()

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
    """Write report.json, and report.md for readers. Mutations without a result keep the row that they have in report.json."""
    place = root / LISTS / "report.json"
    rows = {}
    if len(results) < len(mutations) and place.exists():
        rows = {row["name"]: row for row in json.loads(place.read_text(encoding="utf-8"))["mutations"]}
    commit = commit_of(root)
    for mutation in mutations:
        if result := results.get(mutation.name):
            # Without pytest's messages, which may have a machine's paths.
            by = result.by.partition(" - ")[0]
            rows[mutation.name] = {
                "name": mutation.name,
                "file": mutation.file,
                "outcome": result.outcome,
                "by": by,
                "commit": commit,
            }
    judged = [rows[mutation.name] for mutation in mutations if mutation.name in rows]
    outcomes = [row["outcome"] for row in judged]
    report: dict[str, Any] = {
        "versions": versions(),
        "counts": {outcome: outcomes.count(outcome) for outcome in ("killed", "survived", "stale", "error")},
        "mutations": judged,
    }
    place.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    place.with_suffix(".md").write_text(page(report, mutations), encoding="utf-8")


def commit_of(root: Path) -> str:
    """Return the commit of the product and the tests, and whether they have been changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout

    changed = [
        line for line in git("status", "--porcelain", "--", *SOURCES).splitlines() if not line[3:].startswith(LEFT_OUT)
    ]
    return git("rev-parse", "HEAD").strip()[:10] + (" with uncommitted changes" if changed else "")


def page(report: dict[str, Any], mutations: list[Mutation]) -> str:
    """Return the report as a page."""
    reasons = {mutation.name: mutation.why for mutation in mutations}
    counts = ", ".join(f"{number} {outcome}" for outcome, number in report["counts"].items())
    named = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "# Mutation check",
        "",
        f"{counts}. {named}.",
        "",
        "`make mutants` writes this page. CONTRIBUTING.md says how to add a mutation.",
        "",
        "| mutation | file | fault | outcome | by | commit |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["mutations"]:
        cells = [row["name"], f"`{row['file']}`", reasons[row["name"]], row["outcome"], row["by"], row["commit"]]
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
    parser.add_argument(
        "--update", action="store_true", help="with --only: renew the rows of these mutations in the report"
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
    everything = mutations = load(options.root)
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
    if options.update or not options.only:
        write_report(options.root, everything, results)
    bad = {name: result for name, result in sorted(results.items()) if result.outcome != "killed"}
    for name, result in bad.items():
        print(f"{result.outcome}: {name}: {result.by}")
    print(f"{len(results) - len(bad)} of {len(results)} mutations killed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
