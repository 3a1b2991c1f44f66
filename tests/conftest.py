"""Settings of the whole test run: where Triton's kernels run, and whether there is a device for tests/gpu."""

import gc
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
GPU_TESTS = TESTS / "gpu"
sys.path[:0] = [
    str(TESTS),
    str(GPU_TESTS),
    str(TESTS.parent / "scripts"),
]  # tests share helper modules, and test the scripts

import interpreter_speed  # noqa: E402

# These take longest. Run first, they leave the many short files for the end, where two processes then finish at about the same time.
LONGEST = (
    "test_policy_loss.py",
    "train/test_train_parallel.py",
    "test_docs.py",
    "test_compile_targets.py",
    "engine/test_server.py",
    "test_tuning.py",
    "integrations/test_selection_paths.py",
    "test_compile_sweep.py",
    "train/test_train_demo.py",
    "engine/test_vllm_run.py",
    "integrations/test_trl_mgrpo.py",
    "test_gpu_check.py",
    "test_gpu_check_faults.py",
    "test_peer_suites.py",
    "test_mutants.py",
    "test_examples.py",
    "test_benchmarks.py",
    "test_gpu_check_command.py",
    "integrations/test_verl_plugin.py",
    "integrations/test_verl_trainer.py",
    "test_compiled_calls.py",
)


def only_gpu_tests(arguments: list[str]) -> bool:
    """Return whether pytest was asked for tests/gpu alone: every path among its arguments lies there."""
    paths = [Path(argument.partition("::")[0]).resolve() for argument in arguments if not argument.startswith("-")]
    paths = [path for path in paths if os.path.exists(path)]  # noqa: PTH110 - Path.exists() raises for a long -k
    return bool(paths) and all(path == GPU_TESTS or GPU_TESTS in path.parents for path in paths)


# Before anything imports triton: its interpreter runs the kernels on CPU tensors. A GPU's tests want the compiler.
GPU_TESTS_ON = os.environ.get("MGRPO_GPU_TESTS_ON") or ("cuda" if only_gpu_tests(sys.argv[1:]) else "")
if GPU_TESTS_ON != "cuda":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    interpreter_speed.prepare()


def pytest_collection_modifyitems(items):
    """Put the longest files first, and of the others those with most tests."""
    counts = Counter(item.path for item in items)
    paths = [(TESTS / name).resolve(strict=True) for name in LONGEST]  # a file that has moved is an error
    first = {path: place - len(paths) for place, path in enumerate(paths)}
    items.sort(key=lambda item: (first.get(item.path, 0), -counts[item.path]))


def pytest_collection_finish():
    """Let later garbage collections skip the million objects that the imports made: each test that watches memory starts some."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # for the checks of C++ bindings for leaks, when the process ends


@pytest.fixture(autouse=True)
def seeded():
    """Let what a test draws depend on no other test: which ran before it in its process is another one every time."""
    import torch  # late: the interpreter's switch above comes first

    torch.manual_seed(0)


@pytest.fixture
def outside_xdist(monkeypatch):
    """Let child processes not see that this one is a worker of pytest-xdist, in which pytest-benchmark measures nothing."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)


def has_gpu() -> bool:
    import torch  # late, too

    return torch.cuda.is_available()


class OneItem(pytest.Dir):
    """tests/gpu where it cannot run in this process: one skip without a GPU; with one, a process of its own, without the interpreter."""

    def collect(self):
        if not has_gpu():
            pytest.skip("no GPU on this machine")
        return [OwnProcess.from_parent(self, name="in_a_process_of_its_own")]


class OwnProcess(pytest.Item):
    def runtest(self):
        settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "pytest", str(GPU_TESTS), "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def pytest_collect_directory(path, parent):
    here = GPU_TESTS_ON == "cuda" and os.environ.get("TRITON_INTERPRET") != "1"
    if path == GPU_TESTS and not os.environ.get("MGRPO_GPU_TESTS_ON") and not (here and has_gpu()):
        return OneItem.from_parent(parent, path=path)
    return None
