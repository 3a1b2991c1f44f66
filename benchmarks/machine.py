"""The machine that figures are of: its name and what they depend on, and how much of it other processes use."""

from __future__ import annotations

import ctypes.util
import datetime
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
CODE = ("benchmarks", "mgrpo_kernels", "csrc", "setup.py")  # what figures are of
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "verl", "flash-attn", "quack-kernels", "triton", "transformers")
INSTRUCTION_SETS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")
INTEL = {85: "Skylake", 106: "Ice Lake", 143: "Sapphire Rapids", 207: "Emerald Rapids", 173: "Granite Rapids"}


def keeping_memory() -> dict[str, str]:
    """Return the environment of a process that keeps the memory of freed tensors: jemalloc, as PyTorch's tuning guide advises for CPUs.

    With the C library's allocator a large tensor is new memory at every call, and the kernel clears it page by page. That takes up to
    twice as long as the op whose result it is, for peers as for ours, and differs from machine to machine.
    """
    library = ctypes.util.find_library("jemalloc")
    kept = "oversize_threshold:1,dirty_decay_ms:-1,muzzy_decay_ms:-1"
    return {"LD_PRELOAD": library, "MALLOC_CONF": kept} if library else {}


def generation(vendor: str, family: int, model: int) -> str:
    """Return the name of a processor's generation, which its model name may not give; its numbers where it is not known here."""
    if vendor == "AuthenticAMD" and family == 23:
        return "Zen 2" if model >= 0x30 else "Zen"
    if vendor == "AuthenticAMD" and family == 25:
        return "Zen 4" if model in range(0x10, 0x20) or model in range(0x60, 0x80) or model >= 0xA0 else "Zen 3"
    if vendor == "AuthenticAMD" and family == 26:
        return "Zen 5"
    return INTEL.get(model, f"model {model}") if family == 6 else f"family {family} model {model}"


def cpu() -> dict[str, Any]:
    """Return name, generation and instruction sets of the first processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(found.get("flags", "").split())
    of = generation(found.get("vendor_id", ""), int(found.get("cpu family", 0)), int(found.get("model", 0)))
    return {
        "name": found.get("model name", platform.machine()),
        "generation": of,
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
    }


def describe() -> dict[str, Any]:
    """Return what figures depend on."""
    from mgrpo_kernels import backend

    processor = cpu()
    installed = {
        dist.metadata["Name"].lower().replace("_", "-"): dist.version for dist in importlib.metadata.distributions()
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{processor['name']} ({processor['generation']})"
    return {
        "device": name,
        "cpu": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python_version": platform.python_version(),
        "torch": torch.__version__,
        "peers": {each: installed[each] for each in PEERS if each in installed},
        "backend": backend.choose("linear_token_stats", None, device, torch.bfloat16),
    }


def slug(machine: dict[str, Any]) -> str:
    """Return the name of the machine's file in results/: cpu-epyc-zen5-2cores."""
    words = re.sub(r"\(.*?\)|AMD|Intel|NVIDIA|CPU|Processor|\d+-Core|@.*", " ", machine["device"]).split()
    first = "-".join(words[:1] or ["unknown"])
    if machine["device"] != f"{machine['cpu']['name']} ({machine['cpu']['generation']})":
        return re.sub(r"[^a-z0-9]+", "-", f"gpu-{'-'.join(words)}".lower()).strip("-")
    return f"cpu-{first}-{machine['cpu']['generation'].replace(' ', '')}-{machine['cores']}cores".lower()


def today() -> str:
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()


def commit() -> str:
    """Return the commit, with -dirty behind it where the code that is timed is not the commit's."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", *CODE, ":!benchmarks/results")
    return f"{git('rev-parse', 'HEAD')}{'-dirty' if changed else ''}"


def stamp() -> dict[str, Any]:
    """Return what a page says of the figures of a script: machine, version, day, commit, and the load beside it."""
    here = describe()
    return {
        "CPU": f"{here['device']}, {here['cores']} cores, {here['threads']} threads",
        "torch": here["torch"],
        "date": today(),
        "commit": commit(),
        "load_average": list(os.getloadavg()),
    }


class Sample(NamedTuple):
    """Seconds of processor time that the machine has used so far, that this process and its children have, and of the clock."""

    machine: float
    own: float
    clock: float


def sample(stat: Path = Path("/proc/stat")) -> Sample:
    """Return the machine's account now. Time stolen by other guests of the same host counts as used."""
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text(encoding="ascii").split()[1:9])
    used = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = sum(
        each.ru_utime + each.ru_stime
        for each in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    return Sample(used, own, time.monotonic())


def others(before: Sample, after: Sample) -> float:
    """Return how many cores all other processes used between two samples, on average."""
    own = after.own - before.own
    return max(0.0, after.machine - before.machine - own) / max(after.clock - before.clock, 1e-9)
