"""What the benchmarks share: real heads, honest clocks, ceilings measured beside the op, memory.

Every benchmark checks its result against the reference before it is timed. A ratio is the median over pairs of runs, op and
ceiling in turn, so that a slow minute of a shared machine hits both.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


class Head(NamedTuple):
    """A language model's head."""

    hidden: int
    vocab: int


HEADS = {
    "qwen2.5-0.5b": Head(896, 151936),
    "qwen3-0.6b": Head(1024, 151936),
    "qwen2.5-7b": Head(3584, 152064),
    "llama3-8b": Head(4096, 128256),
    "gemma2-9b": Head(3584, 256000),
}
TOKENS = 8192 if GPU else 1024
ROUNDS = 5 if GPU else 3  # of what takes a CPU seconds
HERE = list(HEADS) if GPU else ["qwen2.5-0.5b"]  # the others take a CPU minutes, and show nothing else


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)


def head_inputs(head: str, dtype: torch.dtype, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden ``(N, H)``, weight ``(V, H)`` and labels ``(N,)``: logits of about the spread that real ones have."""
    torch.manual_seed(0)
    width, vocab = HEADS[head]
    hidden = torch.randn(tokens, width, device=DEVICE).to(dtype)
    weight = torch.empty(vocab, width, device=DEVICE).normal_(std=2.5 * width**-0.5).to(dtype)
    return hidden, weight, torch.randint(0, vocab, (tokens,), device=DEVICE)


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def clock(function: Callable[[], object]) -> float:
    """Return the seconds that one call takes, GPU work included."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def paired_ratio(function: Callable[[], object], ceiling: Callable[[], object], rounds: int = 5) -> float:
    """Return the median of time(function) / time(ceiling) over interleaved pairs, after a warm-up."""
    function(), ceiling()
    ratios = []
    for _ in range(rounds):
        base = clock(ceiling)
        ratios.append(clock(function) / base)
    return statistics.median(ratios)


def peak_memory(function: Callable[[], object]) -> int:
    """Return by how many bytes memory in use rises above where it was during one call."""
    function()
    if GPU:
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    page = 4096

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    highest, done = resident(), threading.Event()
    before = highest

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.0005):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return highest - before


def measure(
    benchmark,
    function: Callable[[], object],
    *,
    ceiling: Callable[[], object] | None = None,
    ceiling_name: str = "",
    rounds: int = 5,
    **info: float,
) -> None:
    """Time `function`, record its ratio to `ceiling`, its memory, and `info` (bytes, flops, gemms: whose formula is in the file)."""
    if ceiling is not None:
        benchmark.extra_info[f"ratio_to_{ceiling_name}"] = paired_ratio(function, ceiling, rounds)
    benchmark.extra_info["peak_memory_bytes"] = peak_memory(function)
    benchmark.extra_info.update(info)

    def synchronous() -> None:
        function()
        synchronize()

    benchmark.pedantic(synchronous, rounds=rounds, warmup_rounds=1)


def need(module: str) -> None:
    """Skip where a peer is not installed."""
    pytest.importorskip(module, reason=f"the peer {module} is not installed: pip install '.[peers]'")


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Check a result before its time counts: largest error against the largest value."""
    error = (got.float() - want.float()).abs().max() / want.float().abs().max()
    assert error <= tolerance, (
        f"relative error {error:.2e}, allowed {tolerance:.0e}: no time is taken of a wrong result"
    )
