"""Scratch copies of the tree, in which scripts/mutants.py applies a mutation, builds what it changes and runs the tests."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

# Imported once for all tests of a copy; the package itself is imported anew for each.
PRELOADED = (
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "triton",
    "numpy",
    "hypothesis",
    "xdist.plugin",
    "pytest_benchmark.plugin",
    "transformers",
    "transformers.models.qwen2",
    "trl.trainer.grpo_trainer",
)
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


def tracked(root: Path) -> list[str]:
    """Return the files that git tracks, as they are in the working tree."""
    command = ["git", "ls-files", "-z"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(name for name in set(names) if name and (root / name).is_file())


class Copy:
    """A scratch copy of the tree, with the extension that was built in place, where one mutation at a time is applied and tested."""

    def __init__(self, root: Path, place: Path, seconds: float) -> None:
        self.root, self.place, self.seconds = root, place, seconds
        for name in tracked(root):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, place / name)
        for path in root.glob("mgrpo_kernels/_C*.so"):
            shutil.copy2(path, place / "mgrpo_kernels")
        if (peers := root / ".venv" / "peers").is_dir():  # where scripts/peers.sh installs verl and OpenRLHF
            (place / ".venv").mkdir()
            (place / ".venv" / "peers").symlink_to(peers.resolve())
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
            **os.environ,
            "PYTHONPATH": str(self.place),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "240",  # pytest shortens messages to the width of the terminal
            **environment,
        }
        return subprocess.Popen(
            command,
            cwd=self.place,
            env=settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )

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
        self.libraries = {path: path.read_bytes() for path in (place / "mgrpo_kernels").glob("_C*.so")}

    def build(self) -> str:
        """Build what has changed; return why it cannot be built, empty if it can."""
        process = self.process(
            sys.executable,
            "setup.py",
            "build_ext",
            "--inplace",
            MGRPO_REQUIRE_NATIVE="1",
            MGRPO_ISAS="DEFAULT",
            MAX_JOBS="1",
        )
        text = process.communicate()[0]
        if process.returncode == 0:
            return ""
        errors = [line for line in text.splitlines() if "error" in line.lower()] or [text[-300:]]
        return f"does not compile: {errors[0]}".replace(str(self.place), ".")[:300]

    def judge(self, mutation: Mutation) -> Result:
        """Apply a mutation, run its tests and undo it, the file's time and the built library included."""
        path = self.place / mutation.file
        times = path.stat() if path.exists() else None
        try:
            return super().judge(mutation)
        finally:
            for library, content in self.libraries.items():  # the next baseline must not run with this mutant
                library.unlink(missing_ok=True)  # a new file: a process may still have the old one mapped
                library.write_bytes(content)
                os.utime(library, ns=(0, 0))  # older than any build
            if times is not None:
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def rebuild(self, mutation: Mutation) -> str:
        """Build the mutated file from the state after the first build."""
        shutil.rmtree(self.place / "build")
        shutil.copytree(self.built, self.place / "build")
        return self.build()
