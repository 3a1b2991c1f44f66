"""The rates of devices, from the vendors' data sheets or measured on the device of this machine."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels.ops.linear_token_stats import layers, tiled
from mgrpo_kernels.train.config import ModelConfig
from mgrpo_kernels.train.plan.shape import Model, width_of
from mgrpo_kernels.train.rollout.draws import is_in_blocks


class Rates(NamedTuple):
    """Rates of a device, per second."""

    matmul: float  # floating-point operations of matrix products
    head: float  # the same in the fused head, whose products may be others
    bandwidth: float  # bytes read from or written to memory
    operation: float  # shortest duration of an operation, in seconds
    draws: float  # entries of the vocabulary that the sampler draws from
    link: float  # bytes sent to other ranks
    passes: int = 1  # over the weight in a product of few rows; 3 if a library writes a reordered copy and reads it


class Device(NamedTuple):
    """The data sheet of a device, with the vendor's peak rates without sparsity."""

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
"""Rates from the vendors' public specifications, of SXM or OAM boards if there are several variants."""
MATMUL_SHARE, BANDWIDTH_SHARE, LINK_SHARE, LAUNCH = 0.4, 0.7, 0.7, 10e-6
"""Assumptions: fractions of the peaks that are reached, and seconds between two launches in eager PyTorch."""
NOISE_BYTES = 24  # memory traffic of a random number on a GPU: drawn, then clamped, logarithm and sign in place


def rates_of(device: Device, options: ModelConfig) -> Rates:
    """Return the rates that are assumed for a device with this data sheet."""
    peak = 1e12 * (device.bfloat16 if width_of(options) == 2 else device.float32)
    bandwidth = 1e9 * BANDWIDTH_SHARE * device.bandwidth
    matmul = MATMUL_SHARE * peak
    return Rates(matmul, matmul, bandwidth, LAUNCH, bandwidth / NOISE_BYTES, 1e9 * LINK_SHARE * device.link)


def known_device(device: torch.device) -> str | None:
    """Return the name in the table of the device of this machine, or None if it is not in the table."""
    if device.type != "cuda":
        return None
    words = set(re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower()))
    return next((key for key in DEVICES if words.issuperset(key.split("-"))), None)


def room_of(device: torch.device) -> int | None:
    """Return the memory of the device in bytes, or None if the system does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def measure(device: torch.device, dtype: str, model: Model, clock: Callable[[], float] = time.perf_counter) -> Rates:
    """Return measured rates of a device, with matrix products of the model's width. Each is the median of a few tries, about 1 s in all.

    Ranks on one machine communicate through its memory. gloo reads and writes each byte about eight times.
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

        until = time.perf_counter() + 0.2  # on a busy machine, a few tries must suffice
        found = [once(), once()]  # the first warms up
        while len(found) <= tries and time.perf_counter() < until:
            found.append(once())
        return max(statistics.median(found[1:]), 1e-9)

    with torch.no_grad():
        a, b = (torch.ones(n, model.width, device=device, dtype=kind) for n in (rows, model.inner))
        product = 2 * rows * model.width * model.inner
        matmul = product / typical(lambda: torch.mm(a, b.t()))
        logits = torch.empty(rows, model.inner, device=device, dtype=torch.float32)
        head = matmul if on_gpu else product / typical(lambda: tiled.accumulate(logits, a, b.t(), first=True))
        block, other = (torch.ones(numbers, device=device, dtype=torch.float32) for _ in range(2))
        bandwidth = 2 * 4 * numbers / typical(lambda: other.copy_(block), 3)
        few = block[: numbers // 64]
        if is_in_blocks(model.vocabulary, device):
            draws = len(few) / typical(lambda: few.view(16, -1).softmax(-1))
        else:
            draws = len(few) / typical(lambda: few.exponential_().clamp_min_(1e-30).log_().neg_())
        x, w = (
            torch.ones(16, 64, device=device, dtype=torch.float32),
            torch.ones(64, 64, device=device, dtype=torch.float32),
        )
        operation = typical(lambda: [_operations(x, w) for _ in range(5)], 20) / (5 * 8)
    reads_once = kind == torch.float32 and layers.few_rows_is_faster()
    return Rates(matmul, head, bandwidth, operation, draws, bandwidth / 8, passes=1 if on_gpu or reads_once else 3)


def _operations(x: Tensor, w: Tensor) -> Tensor:
    """Run eight operations that are typical of a decoder layer, on a few tokens."""
    y = torch.mm(x, w)
    y = torch.nn.functional.silu(y) * x
    y = torch.cat([y[:, :32], y[:, 32:]], dim=-1)
    return (y + x).softmax(-1)
