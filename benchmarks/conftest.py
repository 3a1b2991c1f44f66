"""Settings of a benchmark run."""

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # benchmarks share harness.py and peers.py

PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "verl", "flash-attn", "quack-kernels", "triton", "transformers")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Each row compiles for itself: past eight shapes torch.compile would fall back to eager, in silence."""
    yield
    torch.compiler.reset()


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    machine_info["device"] = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else machine_info["cpu"].get("brand_raw", "cpu")
    )
    installed = {
        dist.metadata["Name"].lower().replace("_", "-"): dist.version for dist in importlib.metadata.distributions()
    }
    machine_info["peers"] = {name: installed[name] for name in PEERS if name in installed}
    for private in ("node", "release"):
        machine_info.pop(private, None)


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info.pop("author_time", None)
