"""What devices do in a second: by the vendors' data sheets, or measured on the device at hand."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels.train.config import Config
from mgrpo_kernels.train.plan.shape import Model, width_of


class Rates(NamedTuple):
    """What a device does in a second."""

    matmul: float  # floating-point operations of matrix products
    bandwidth: float  # bytes of memory
    operation: float  # seconds that an operation takes at least
    draws: float  # random numbers
    link: float  # bytes to other ranks
    passes: int = 1  # over its weight, of a product of few rows: a CPU's library reads it, writes it in its own order, and reads that


class Device(NamedTuple):
    """A data sheet: dense peaks, as the vendor gives them."""

    bfloat16: float  # TFLOP/s
    float32: float  # TFLOP/s, outside tensor cores
    bandwidth: float  # GB/s
    link: float  # GB/s, one way
    memory: float  # GB


DEVICES = {
    "a100-80gb": Device(312, 19.5, 2039, 300, 80),
    "h100-80gb": Device(989, 67, 3350, 450, 80),
    "h200": Device(989, 67, 4800, 450, 141),
    "b200": Device(2250, 75, 8000, 900, 180),
    "l4": Device(121, 30.3, 300, 32, 24),
    "rtx-4090": Device(165, 82.6, 1008, 32, 24),
    "mi300x": Device(1307, 163, 5300, 448, 192),
}
"""From the vendors' public specifications (SXM and OAM boards where there are several)."""
MATMUL_SHARE, BANDWIDTH_SHARE, LINK_SHARE, LAUNCH = 0.4, 0.7, 0.7, 10e-6
"""Assumed: what of a peak is reached, and seconds from one launch to the next in eager PyTorch."""
NOISE_BYTES = 24  # of memory a random number costs a GPU: drawn, then bounded, logarithm and sign in place


def rates_of(device: Device, config: Config) -> Rates:
    """Return what a data sheet lets one expect."""
    peak = 1e12 * (device.bfloat16 if width_of(config) == 2 else device.float32)
    bandwidth = 1e9 * BANDWIDTH_SHARE * device.bandwidth
    return Rates(MATMUL_SHARE * peak, bandwidth, LAUNCH, bandwidth / NOISE_BYTES, 1e9 * LINK_SHARE * device.link)


def known_device(device: torch.device) -> str | None:
    """Return the name in the table of the device at hand, or None."""
    if device.type != "cuda":
        return None
    words = set(re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower()))
    return next((key for key in DEVICES if words.issuperset(key.split("-"))), None)


def room_of(device: torch.device) -> int | None:
    """Return the bytes of memory that the device has, where the system says so."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def measure(device: torch.device, dtype: str, model: Model, clock: Callable[[], float] = time.perf_counter) -> Rates:
    """Return what a device does in a second, with products of the model's width; the median of a few tries, about a second in all.

    Where ranks share a machine's memory a byte goes to another through it, and is read and written some eight times: gloo's rate.
    """
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    on_gpu = device.type == "cuda"
    rows, numbers = (8192, 2**28) if on_gpu else (1024, 2**24)

    def typical(work: Callable[[], Any], tries: int = 5) -> float:
        def once() -> float:
            if on_gpu:
                torch.cuda.synchronize(device)
            begin = clock()
            work()
            if on_gpu:
                torch.cuda.synchronize(device)
            return clock() - begin

        until = time.perf_counter() + 0.2  # where others take the cores, few must do
        found = [once(), once()]  # the first warms up
        while len(found) <= tries and time.perf_counter() < until:
            found.append(once())
        return max(statistics.median(found[1:]), 1e-9)

    with torch.no_grad():
        a, b = (torch.ones(n, model.width, device=device, dtype=kind) for n in (rows, model.inner))
        matmul = 2 * rows * model.width * model.inner / typical(lambda: torch.mm(a, b.t()))
        block, other = (torch.ones(numbers, device=device) for _ in range(2))
        bandwidth = 2 * 4 * numbers / typical(lambda: other.copy_(block), 3)
        few = block[: numbers // 64]
        draws = len(few) / typical(lambda: few.exponential_().clamp_min_(1e-30).log_().neg_())
        x, w = torch.ones(16, 64, device=device), torch.ones(64, 64, device=device)
        operation = typical(lambda: [_operations(x, w) for _ in range(5)], 20) / (5 * 8)
    return Rates(matmul, bandwidth, operation, draws, bandwidth / 8, passes=1 if on_gpu else 3)


def _operations(x: Tensor, w: Tensor) -> Tensor:
    """Run eight operations of a decoder's layer on a few tokens."""
    y = torch.mm(x, w)
    y = torch.nn.functional.silu(y) * x
    y = torch.cat([y[:, :32], y[:, 32:]], dim=-1)
    return (y + x).softmax(-1)
