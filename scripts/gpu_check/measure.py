"""What environment.json and profile.json hold, measured in a process of its own: ``measure.py environment|profile [--on-cpu]``."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def commit() -> str | None:
    """Return the tree's commit, with a + if files differ from it; None where neither git nor anything else knows it."""
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


def driver() -> str | None:
    """Return the GPU driver's version; None without nvidia-smi."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def median_seconds(function: Callable[[], object], on_gpu: bool) -> float:
    """Return the median time of a call, without the first two."""
    import torch

    times = []
    for _ in range(12):
        begin = time.perf_counter()
        if on_gpu:
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


def environment(on_cpu: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the rows of environment.json."""
    import torch

    device = torch.device("cpu" if on_cpu else "cuda")
    size, count = (256, 2**20) if on_cpu else (8192, 2**30)

    def versions() -> dict[str, Any]:
        import triton

        return {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "commit": commit(),
            "python": platform.python_version(),
            "cpu_cores": os.cpu_count(),
        }

    def the_device() -> dict[str, Any]:
        if on_cpu:
            return dict.fromkeys(("capability", "multiprocessors", "memory_bytes", "driver")) | {
                "device": platform.processor() or "cpu"
            }
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": driver(),
        }

    def copy() -> dict[str, Any]:
        source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return {"copy_bytes_per_second": 2 * count / median_seconds(lambda: target.copy_(source), not on_cpu)}

    def matmul() -> dict[str, Any]:
        a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        product = torch.empty_like(a)
        seconds = median_seconds(lambda: torch.mm(a, b, out=product), not on_cpu)
        return {"matmul_flop_per_second": 2 * size**3 / seconds, "matmul": f"{size}^3 bfloat16"}

    rows = {"versions": versions, "device": the_device, "copy bandwidth": copy, "matmul rate": matmul}
    return {name: lambda row=row: {"found": row()} for name, row in rows.items()}  # type: ignore[misc]


def profile(on_cpu: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the rows of profile.json: the kernels of one step of each op at full size."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]
    if on_cpu:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from calls import CALLS, Sizes, device_work

    sizes = Sizes(16, 16, 300, 3, 100) if on_cpu else Sizes(8192, 3584, 152064, 1000, 2**20)

    def kernels(name: str) -> dict[str, Any]:
        call = CALLS[name](sizes, torch.device("cpu" if on_cpu else "cuda"))
        if on_cpu:  # a CPU runs no kernels to be profiled: the step alone
            call.run()
            return {"sizes": sizes._asdict(), "kernels": []}
        work = [
            {"kernel": kernel[:200], "count": count, "microseconds": round(time, 1)}
            for kernel, (count, time) in device_work(call.run).items()
        ]
        del call
        torch.cuda.empty_cache()
        return {"sizes": sizes._asdict(), "kernels": work}

    return {name: lambda name=name: kernels(name) for name in CALLS}  # type: ignore[misc]


def main() -> None:
    """Run the rows that no earlier process began."""
    from gpu_check import rows

    what, on_cpu = sys.argv[1], "--on-cpu" in sys.argv[2:]
    table = {"environment": environment, "profile": profile}[what](on_cpu)
    worker = rows.Worker()
    for name in worker.collect(table):
        worker.do(name, table[name])


if __name__ == "__main__":
    main()
