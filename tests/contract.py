"""What the contract tests of all ops share: backends, tolerances, and watchers of memory."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import interpreter_speed
import pytest
import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from mgrpo_kernels import backend as backends

interpreter_speed.prepare()
CPU = torch.device("cpu")
BACKENDS = ("reference", "native", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def each_backend(op: str) -> pytest.MarkDecorator:
    """Run the test on every backend of `op`. One that cannot run fails the test: nothing is skipped in silence."""
    return pytest.mark.parametrize("backend", [name for name in BACKENDS if name in backends._registry[op]])


def assert_no_worse_than_plain(
    got: Tensor, plain: Tensor, truth: Tensor, *, factor: float = 1.5, floor: float = 1e-6
) -> None:
    """Hold `got`'s error against the float64 `truth` to `factor` times that of plain PyTorch in the working precision.

    The error is the root mean square; the largest one may be twice as far out again, for it is one draw of many roundings.
    `floor` is relative to the truth's largest magnitude: below it both are exact for every purpose. Non-finite values must
    stand in the same places as in the truth.
    """
    assert got.shape == truth.shape
    finite = truth.isfinite()
    torch.testing.assert_close(got[~finite].double(), truth[~finite], equal_nan=True)
    if not finite.any():
        return
    floor = floor * max(1.0, truth[finite].abs().max().item())
    for name, norm, allowance in (
        ("rms", lambda e: e.square().mean().sqrt(), factor),
        ("max", lambda e: e.abs().max(), 2 * factor),
    ):
        error, plain_error = (norm(each[finite].double() - truth[finite]).item() for each in (got, plain))
        assert error <= allowance * plain_error + floor, (
            f"{name} error {error:.3e}, plain PyTorch's {plain_error:.3e}, floor {floor:.1e}"
        )


def on_ranks(ranks: int, function: Callable[..., None], *args: Any) -> None:
    """Call ``function(rank, *args)`` in a process of each rank: forks of one process that has imported what takes long and runs nothing."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["pytest", "torch._dynamo.testing", "torch.distributed.fsdp", "triton.runtime.interpreter"]
    )
    torch.multiprocessing.start_processes(function, args, nprocs=ranks, start_method="forkserver")


@dataclasses.dataclass
class Memory:
    """What :func:`watch_memory` saw, in bytes; 0 until its block has ended."""

    largest: int = 0  # single allocation
    peak: int = 0  # most that was allocated in the block and not yet freed


@contextlib.contextmanager
def watch_memory() -> Iterator[Memory]:
    """Watch every allocation of tensor memory in the block, on CPU and GPU: inside custom ops, C++ kernels and backward passes too.

    The allocators report to PyTorch's profiler. A dispatch mode would see only what ops return, and is off inside a custom op.
    Memory from before the block counts neither when it is used nor when it is freed. Not seen: memory of C++ containers and of NumPy, and
    of threads that the block starts itself; PyTorch's own pool is kept to this thread meanwhile.

    Raises:
        RuntimeError: the profiler has missed allocations, as it does where another profile was started inside the block.
    """
    memory, threads = Memory(), torch.get_num_threads()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    gc.collect()  # or garbage of before, collected meanwhile, would be taken for an end of something new at its address
    torch.set_num_threads(1)
    try:
        with profile(activities=activities, profile_memory=True) as profiler:
            first = torch.empty(_MARK, dtype=torch.uint8).data_ptr()
            yield memory
            last = torch.empty(_MARK, dtype=torch.uint8).data_ptr()
    finally:
        torch.set_num_threads(threads)
    events = _allocations(profiler)
    marks = [i for i, (address, size) in enumerate(events) if size == _MARK and address[1] in (first, last)]
    if len(marks) < 2:
        raise RuntimeError(
            "watch_memory: expected the profiler to record every allocation of the block, got an incomplete record"
        )
    live: dict[tuple[str, int], int] = {}
    total = 0
    for address, size in events[marks[0] + 2 : marks[-1]]:  # the mark is freed at once
        if size > 0:
            live[address] = size
            total += size
        else:
            total -= live.pop(address, 0)
        memory.largest, memory.peak = max(memory.largest, size), max(memory.peak, total)


_MARK = 4099  # bytes: a size that nothing else has


def _allocations(profiler: profile) -> list[tuple[tuple[str, int], int]]:
    """Return ((device, address), bytes) of each allocation, and of each free with its bytes negative, in order of time."""

    def events(nodes: Any) -> Iterator[Any]:
        for node in nodes:
            if node.tag == _EventType.Allocation:
                yield node
            yield from events(node.children)

    kineto = profiler.profiler.kineto_results
    found = sorted(events(kineto.experimental_event_tree()), key=lambda event: event.start_time_ns)
    return [((str(e.extra_fields.device), e.extra_fields.ptr), e.extra_fields.alloc_size) for e in found]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every fresh ``empty`` tensor with NaN (or the largest integer), so that unwritten results show."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
