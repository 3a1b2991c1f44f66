"""How a row is timed: the provider, ours and the ceiling in turn, on the same inputs, after both results have been checked.

A time is one call: on a GPU between two device events with the L2 cache flushed before, on a CPU the wall clock's. Every ratio is the
median over rounds, and a round calls the ceiling, ours and the provider one after the other, so that a slow minute of a shared machine
falls on all three. Milliseconds of different rows come from different minutes: never divide one by another.

Passes: ``forward`` without gradient, ``backward`` alone (a fresh graph for each round is built outside the clock), ``both``.
MGRPO_BENCH_SMALL=1 shrinks every shape, to try the benchmarks themselves.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SMALL = os.environ.get("MGRPO_BENCH_SMALL") == "1"
SECONDS = 0.02 if SMALL else 1.0 if GPU else 1.5  # of rounds for a row of a table
ROUNDS = 3, 50  # at least and at most

Check = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], None]


atexit.register(gc.unfreeze)  # of what `peak_memory` freezes


def size(full: int, small: int) -> int:
    return small if SMALL else full


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


@functools.lru_cache(maxsize=1)
def _l2_flusher() -> Tensor:
    return torch.empty(size(2**28, 2**10), dtype=torch.uint8, device=DEVICE)  # larger than any L2 cache so far


def clock(function: Callable[[], object]) -> float:
    """Return the seconds that one call takes; on a GPU by device events, behind a flush of L2 that also hides the first launch."""
    if not GPU:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _l2_flusher().zero_()
    first.record()
    function()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def percentile(samples: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the samples lie, interpolated as ``torch.quantile`` does."""
    return torch.tensor(samples, dtype=torch.float64).quantile(share).item()


def peak_memory(function: Callable[[], object]) -> int:
    """Return by how many bytes memory in use rises above where it was during one call.

    On a GPU by the allocator's account; on a CPU the resident size, looked at every millisecond.
    """
    gc.collect()
    gc.freeze()  # the next collection need not look through what is alive now: some hundred thousand objects of the imports
    if GPU:
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # or memory that an earlier call gave back would serve this one, and not be seen

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = highest = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        highest = max(highest, resident())
        done.set()
        watcher.join()
    return highest - before


class Pass:
    """A pass of one provider: ``run`` is what is timed, ``graph`` what comes before, outside the clock."""

    def __init__(
        self, step: str, forward: Callable[[], tuple[Tensor, ...]], leaves: Sequence[Tensor], upstream: Sequence[Tensor]
    ) -> None:
        self.step, self.forward, self.leaves, self.upstream = step, forward, leaves, upstream

    def graph(self) -> tuple[Tensor, ...] | None:
        return self.forward() if self.step == "backward" else None

    def run(self, outputs: tuple[Tensor, ...] | None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return outputs and gradients; none of the latter where only forward is timed."""
        if self.step == "forward":
            with torch.no_grad():
                return self.forward(), ()
        outputs = self.forward() if outputs is None else outputs
        given = [
            torch.ones_like(out) if out.dim() == 0 else grad.view_as(out).to(out.dtype)
            for grad, out in zip(self.upstream, outputs, strict=True)
        ]
        return outputs, torch.autograd.grad(outputs, self.leaves, given)

    def timed(self) -> float:
        outputs = self.graph()
        return clock(lambda: self.run(outputs))

    def first(self, check: Check) -> tuple[int, float]:
        """Check one call, then return the memory and the seconds of another."""
        check(*self.run(self.graph()))
        seconds = 0.0

        def second() -> None:  # forward and backward, or what forward keeps would not be seen
            nonlocal seconds
            begin = time.perf_counter()
            self.run(self.graph())
            synchronize()
            seconds = time.perf_counter() - begin

        return peak_memory(second), seconds

    def only(self, check: Check) -> tuple[int, float]:
        """Return the memory of one call, forward and backward, and the seconds of its pass, if its result is right."""
        result: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] = ((), ())
        seconds = 0.0

        def call(outputs: tuple[Tensor, ...] | None) -> None:
            nonlocal result
            result = self.run(outputs)

        def looked_at() -> None:
            nonlocal seconds
            outputs = self.graph()
            seconds = clock(lambda: call(outputs))

        memory = peak_memory(looked_at)
        check(*result)
        return memory, seconds


class Round(NamedTuple):
    """Seconds of the three, one after the other."""

    ceiling: float
    ours: float | None
    provider: float


def measure(
    benchmark: Any,
    step: str,
    forward: Callable[[], tuple[Tensor, ...]],
    leaves: Sequence[Tensor] = (),
    upstream: Sequence[Tensor] = (),
    *,
    provider: str,
    ours: tuple[str, Callable[[], tuple[Tensor, ...]]] | None,
    check: Check,
    ceiling: Callable[[], object],
    ceiling_name: str,
    ceilings: float = 1.0,
    patient: bool = False,
    reset: Callable[[], object] = lambda: None,
    **info: object,
) -> None:
    """Check `forward` and ours, then time `step` of both beside the ceiling, and record it in ``benchmark.extra_info``.

    Args:
        benchmark: pytest-benchmark's fixture. Its own figures are wall clock; on a GPU ``extra_info`` has the device's.
        step: "forward", "backward" or "both".
        forward: returns the outputs.
        leaves: what gradients are taken of; with `upstream`, the gradients of the outputs.
        provider: whose row this is.
        ours: the name and the forward of ours that computes the same, on the same inputs. A row of ours itself has None.
        check: raises if outputs or gradients are wrong.
        ceiling: work whose time, `ceilings` times, is the least possible (the matmuls of the pass; 0 leaves no share to speak of).
        patient: one call takes minutes: each side is called once, and that call is checked, looked at for memory, and timed.
        reset: puts back what a call changes in place; called before each side is checked.
        info: what the file's docstring gives a formula for: bytes, flops, gemms; shape; what is computed.
    """
    if ours is None and not provider.startswith("ours"):
        raise ValueError(f"{provider}: expected ours beside it, got None: its time could not be compared with anything")
    theirs = Pass(step, forward, leaves, upstream)
    mine = None if ours is None else Pass(step, ours[1], leaves, upstream)
    ceiling()
    rounds: list[Round] = []
    if patient:
        base = clock(ceiling)
        reset()
        my_memory, my_seconds = mine.only(check) if mine else (0, None)
        reset()
        memory, seconds = benchmark.pedantic(theirs.only, args=(check,), rounds=1)
        rounds.append(Round(base, my_seconds, seconds))
    else:
        reset()
        # Nothing of ours compiles on a CPU, where a call may take seconds: one shows all.
        my_memory, my_once = (mine.first if GPU else mine.only)(check) if mine else (0, 0.0)
        reset()
        memory, once = theirs.first(check)
        least, most = ROUNDS
        count = max(least, min(most, int(SECONDS / max(once + my_once, 1e-9))))

        def setup() -> tuple[tuple[object, float, float | None], dict[str, object]]:
            base = clock(ceiling)
            my_seconds = mine.timed() if mine else None
            return (theirs.graph(), base, my_seconds), {}

        def target(outputs: tuple[Tensor, ...] | None, base: float, my_seconds: float | None) -> None:
            rounds.append(Round(base, my_seconds, clock(lambda: theirs.run(outputs))))

        benchmark.pedantic(target, setup=setup, rounds=count)
    benchmark.extra_info.update(
        figures(rounds, ceilings), ceiling=ceiling_name, peak_memory_bytes=memory, provider=provider, **info
    )
    if ours is not None:
        benchmark.extra_info.update(pair(rounds), ours=ours[0], ours_peak_memory_bytes=my_memory)


def figures(rounds: Sequence[Round], ceilings: float) -> dict[str, Any]:
    """Return the figures of the provider: milliseconds, and times its ceiling."""
    samples = [each.provider for each in rounds]
    ratio = percentile([each.provider / each.ceiling for each in rounds], 0.5)
    return {
        **{f"p{share}_ms": 1e3 * percentile(samples, share / 100) for share in (20, 50, 80)},
        "rounds": len(rounds),
        "ratio": ratio,
        "share_of_ceiling": ceilings / ratio if ceilings else None,
    }


def pair(rounds: Sequence[Round]) -> dict[str, float]:
    """Return the figures of the comparison: how many times as long as ours the provider takes, round by round."""
    ratios = [each.provider / each.ours for each in rounds if each.ours is not None]
    return {
        "ratio_to_ours": percentile(ratios, 0.5),
        "ratio_to_ours_p20": percentile(ratios, 0.2),
        "ratio_to_ours_p80": percentile(ratios, 0.8),
        "ours_p50_ms": 1e3 * percentile([each.ours for each in rounds if each.ours is not None], 0.5),
    }
