"""Settings of a benchmark run."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # benchmarks share harness.py


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    machine_info["device"] = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else machine_info["cpu"].get("brand_raw", "cpu")
    )
    for private in ("node", "release"):
        machine_info.pop(private, None)


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info.pop("author_time", None)
