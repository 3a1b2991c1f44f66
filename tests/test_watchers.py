"""The watchers of tests/contract.py, held to what they must see; and the ranks of tests/forked_ranks.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract import watch_memory
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

MIB = 2**20
SCALARS = 1000  # bytes that the numbers in x.add_(1), gradients of sums and the like may take


def spend(bytes_used):
    """Allocate, write and free."""
    torch.empty(bytes_used, dtype=torch.uint8).zero_()


@torch.library.custom_op("mgrpo_tests::spends_inside", mutates_args=())
def spends_inside(x: torch.Tensor, forward: int, backward: int) -> torch.Tensor:
    spend(forward)
    return x.clone()


@torch.library.custom_op("mgrpo_tests::spends_inside_backward", mutates_args=())
def spends_inside_backward(grad: torch.Tensor, backward: int) -> torch.Tensor:
    spend(backward)
    return grad.clone()


def _keep(ctx, inputs, output):
    ctx.backward = inputs[2]


spends_inside.register_autograd(
    lambda ctx, grad: (spends_inside_backward(grad, ctx.backward), None, None), setup_context=_keep
)


class Results(TorchDispatchMode):
    """What a dispatch mode sees: the bytes of every op's result."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(("forward", "backward"), [(8 * MIB, 0), (0, 8 * MIB)])
def test_an_allocation_inside_a_custom_op_is_seen_where_a_dispatch_mode_is_blind(forward, backward):
    x = torch.randn(10, requires_grad=True)
    with watch_memory() as memory, Results() as results:
        spends_inside(x, forward, backward).sum().backward()
    assert 8 * MIB <= memory.largest <= memory.peak <= 8 * MIB + SCALARS
    assert results.largest <= 40


def test_forward_and_backward_are_told_apart():
    x = torch.randn(10, requires_grad=True)
    with watch_memory() as memory:
        y = spends_inside(x, 3 * MIB, 5 * MIB).sum()
    assert 3 * MIB <= memory.largest <= memory.peak <= 3 * MIB + SCALARS
    with watch_memory() as memory:
        y.backward()
    assert 5 * MIB <= memory.largest <= memory.peak <= 5 * MIB + SCALARS


def test_an_allocation_inside_a_kernel_of_aten_is_seen():
    """One call whose result is small: attention by its definition holds the scores, softmax of a transposed tensor a copy."""
    x = torch.randn(1, 1, 1024, 8)
    with watch_memory() as memory:
        torch.ops.aten._scaled_dot_product_attention_math(x, x, x)
    assert memory.largest >= 4 * 1024 * 1024


def test_many_small_allocations_are_a_peak():
    with watch_memory() as memory:
        kept = [torch.empty(MIB // 16, dtype=torch.uint8) for _ in range(64)]
    assert memory.largest == MIB // 16
    assert memory.peak == 4 * MIB
    del kept


def test_what_is_freed_or_written_in_place_counts_once():
    before = torch.zeros(MIB, dtype=torch.uint8)
    with watch_memory() as memory:
        for _ in range(10):
            spend(MIB)
        x = torch.zeros(2 * MIB, dtype=torch.uint8)
        for _ in range(10):
            x.add_(1).mul_(2)
            x[: MIB // 2].copy_(x[MIB // 2 : MIB])
        before.fill_(3)
    assert 2 * MIB == memory.largest <= memory.peak <= 2 * MIB + SCALARS


def test_a_free_of_older_memory_hides_nothing():
    before = [torch.zeros(4 * MIB, dtype=torch.uint8)]
    with watch_memory() as memory:
        before.clear()
        spend(3 * MIB)
    assert memory.peak == 3 * MIB


def test_a_block_that_allocates_nothing_reads_zero():
    x = torch.zeros(10)
    with watch_memory() as memory:
        x.neg_()
    assert (memory.largest, memory.peak) == (0, 0)


def test_an_error_in_the_block_is_the_callers():
    with pytest.raises(ValueError, match="the caller's"), watch_memory():
        raise ValueError("the caller's")


def test_a_profile_inside_the_block_is_refused():
    """It ends the outer record: what came before would be lost in silence."""

    def profiled():
        with watch_memory(), profile(activities=[ProfilerActivity.CPU], profile_memory=True):
            spend(MIB)

    with pytest.raises(RuntimeError, match="incomplete record"):
        profiled()


def test_threads_of_the_pool_are_seen_and_given_back():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        layer = nn.Linear(256, 256)
        with watch_memory() as memory:
            assert torch.get_num_threads() == 1
            layer(torch.ones(4096, 256)).sum().backward()
        assert torch.get_num_threads() == 2
        assert memory.largest == 4 * 4096 * 256
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("failing", ["os._exit(3)", "os.kill(os.getppid(), signal.SIGTERM)"])
def test_a_rank_that_fails_and_the_end_of_their_process_end_the_ranks(tmp_path, failing):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "print(f'rank {dist.get_rank()} of {dist.get_world_size()}: {sys.argv[1:]}', flush=True)\n"
        f"if dist.get_rank() == 1: {failing}\n"
        "time.sleep(600)\n"
    )
    forked = Path(__file__).with_name("forked_ranks.py")
    command = [sys.executable, str(forked), "torch.distributed", str(script), "an argument"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert "rank 1 of 2: ['an argument']" in done.stdout, done.stderr
