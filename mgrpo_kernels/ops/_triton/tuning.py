"""Sizes that depend on the device and not on the problem: measured ones where there are any, reasoned ones elsewhere.

``benchmarks/tune.py`` measures them on a device and writes ``tuned/<device>.json``, which is committed. Nothing is ever measured
while the library runs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "tuned"


@dataclasses.dataclass(frozen=True)
class Tuning:
    """One device's choice. The defaults are reasoned for an H100 and never slow elsewhere: docs/kernels_without_a_gpu.md."""

    stats_forward: tuple[int, int] = (256, 4)  # threads, and 16-byte loads that each has in flight
    stats_backward: tuple[int, int] = (256, 2)
    tile_state: tuple[int, int] = (
        128,
        4,
    )  # the passes over tiles a few thousand columns wide: fewer threads to agree at its end
    tile_gradient: tuple[int, int] = (128, 2)  # with 4 loads, Triton 3.6 needs 72 registers a thread, not 48
    programs_per_processor: int = 4  # how many fill a multiprocessor, when each has about 16 KiB of loads in flight
    ema: tuple[int, int, int] = (32768, 2048, 8)  # elements of a program, elements of a step, warps
    forward_tile: tuple[int, int] = (8192, 8192)  # rows and columns of logits at once
    backward_rows: int = 16384  # likewise; columns as many as the workspace holds
    workspace_bytes: int = 512 * 2**20
    # Or "fused": our own, whose logits stay float32 in its registers. Forward and backward alike: logsumexp and gradient must be of
    # the same logits, rounded to 16 bits or not. With a gradient_tolerance the library's matmul is used, so that the statistics agree
    # with those of the exact call to rounding only.
    matmul: str = "library"
    fused_tile: tuple[int, int, int, int, int] = (
        128,
        128,
        64,
        4,
        8,
    )  # rows, columns, inner, stages, warps: nothing spills


def slug(device_name: str) -> str:
    """Return a device's name as file names contain it: "NVIDIA H100 80GB HBM3" gives "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def read(path: Path) -> Tuning:
    """Return the choice that a file holds under "tuning"."""
    entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["tuning"]
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in entries.items()
    }
    return Tuning(**values)


@functools.cache
def of(device: torch.device) -> Tuning:
    """Return the device's own choice, or the defaults."""
    if device.type != "cuda":
        return Tuning()  # the interpreter
    path = FOLDER / f"{slug(torch.cuda.get_device_name(device))}.json"
    return read(path) if path.exists() else Tuning()
