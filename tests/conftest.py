"""Settings of the whole test run: where Triton's kernels run, and whether there is a device for tests/gpu."""

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
GPU_TESTS = TESTS / "gpu"
sys.path[:0] = [str(TESTS), str(GPU_TESTS)]  # tests share helper modules


def only_gpu_tests(arguments: list[str]) -> bool:
    """Return whether pytest was asked for tests/gpu alone: every path among its arguments lies there."""
    paths = [Path(argument.partition("::")[0]).resolve() for argument in arguments if not argument.startswith("-")]
    paths = [path for path in paths if path.exists()]
    return bool(paths) and all(path == GPU_TESTS or GPU_TESTS in path.parents for path in paths)


# Before anything imports triton: its interpreter runs the kernels on CPU tensors. A GPU's tests want the compiler.
GPU_TESTS_ON = os.environ.get("MGRPO_GPU_TESTS_ON") or ("cuda" if only_gpu_tests(sys.argv[1:]) else "")
if GPU_TESTS_ON != "cuda":
    os.environ.setdefault("TRITON_INTERPRET", "1")


def why_no_gpu_tests() -> str | None:
    """Return why tests/gpu cannot run, or None."""
    if os.environ.get("MGRPO_GPU_TESTS_ON"):  # "cuda" or "cpu": who says so wants no skip
        return None
    import torch

    if not torch.cuda.is_available():
        return "no GPU on this machine"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter is on for the other tests: run `pytest tests/gpu` alone"
    return None


class SkippedFolder(pytest.Dir):
    """The folder as one skipped item."""

    def collect(self):
        pytest.skip(why_no_gpu_tests())


def pytest_collect_directory(path, parent):
    if path == GPU_TESTS and why_no_gpu_tests() is not None:
        return SkippedFolder.from_parent(parent, path=path)
    return None
