"""What the ops promise of a device: the same bits, no waiting for it, CUDA graphs, one launch, whole compilation."""

import contextlib
import logging
from unittest import mock

import pytest
import torch
from calls import CALLS, SEQUENCES, WAITING, Sizes, device_work
from on_device import CPU, DEVICE, ON_CPU, pick
from torch._dynamo.testing import CompileCounterWithBackend

from mgrpo_kernels import (
    backend,
    backends,
    ema_update_,
    iqr_filter,
    linear_token_stats,
    policy_loss,
    token_stats_from_logits,
)
from mgrpo_kernels.ops import _rows
from mgrpo_kernels.ops.linear_token_stats import staircase

SIZES = pick(Sizes(512, 256, 5003, 20, 10_001), Sizes(16, 16, 300, 3, 101))
OPS = list(CALLS)


def make(op, seed=0):
    torch.manual_seed(seed)
    return (CALLS | WAITING)[op](SIZES, DEVICE)


def assert_same(first, second):
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text, i=i: f"result {i}: {text}")


@pytest.mark.parametrize("op", [*OPS, *WAITING])
def test_same_bits_twice(op):
    call = make(op)
    first = [each.clone() for each in call.run()]
    assert_same(call.run(), first)


@pytest.mark.device_only
def test_triton_is_chosen(caplog):
    for op, table in backends().items():
        assert table["triton"] == "ok", f"{op}: {table['triton']}"
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert backend.choose(op, None, torch.device("cuda"), dtype) == "triton"
    backend._logged.clear()
    with caplog.at_level(logging.INFO, logger="mgrpo_kernels"):
        iqr_filter(torch.rand(8, device=DEVICE), 4)
    assert "iqr_filter runs on the triton backend" in caplog.text


@contextlib.contextmanager
def no_waiting():
    """Let every wait of the host for the device raise."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.device_only
@pytest.mark.parametrize("op", OPS)
def test_no_host_sync(op):
    call = make(op)
    call.run()
    with no_waiting():
        call.run()


@pytest.mark.device_only
def test_with_a_tolerance_the_host_waits_for_the_steps_alone():
    call, stair_of = make("sparse_token_stats"), staircase.stair_of
    call.run()

    def may_wait(*given):
        torch.cuda.set_sync_debug_mode("default")
        stair = stair_of(*given)
        torch.cuda.set_sync_debug_mode("error")
        return stair

    with mock.patch.object(staircase, "stair_of", side_effect=may_wait) as waits, no_waiting():
        call.run()
    assert waits.call_count == 1


@pytest.mark.device_only
def test_the_watch_for_syncs_works():
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=DEVICE).item()


@pytest.mark.device_only
@pytest.mark.parametrize("op", ["token_stats", "linear_token_stats"])
@pytest.mark.parametrize("bad", [-1, 10**6, 2**31 - 1])
def test_a_bad_label_is_nan_in_its_row_alone(op, bad):
    rows, width, vocab = 7, 64, 300
    hidden, weight = (torch.randn(n, width, device=DEVICE).bfloat16().requires_grad_() for n in (rows, vocab))
    logits = (hidden @ weight.t()).detach().requires_grad_()
    labels = torch.arange(rows, device=DEVICE, dtype=torch.int32)
    labels[3] = bad

    def stats(**options):
        if op == "token_stats":
            return token_stats_from_logits(logits, labels, **options)
        return linear_token_stats(hidden, weight, labels, **options)

    leaf = logits if op == "token_stats" else hidden
    torch.autograd.grad(stats().entropy.sum(), leaf)  # compiles
    with no_waiting():
        got = stats()
        (grad,) = torch.autograd.grad(got.entropy.sum(), leaf, retain_graph=True)
    assert got.logprob.isnan().tolist() == [row == 3 for row in range(rows)]
    assert got.entropy.isfinite().all()
    assert grad.isfinite().all()
    (grad,) = torch.autograd.grad(got.logprob.sum(), leaf)
    others = torch.arange(rows, device=DEVICE) != 3
    assert grad[others].isfinite().all()
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 300\)"):
        stats(debug=True)


@pytest.mark.device_only
@pytest.mark.parametrize("op", ["token_stats", "policy_loss", "grpo_loss", "group_advantages", "iqr_filter"])
def test_cuda_graph(op):
    call = make(op)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call.run()
    for seed in (1, 2):
        other = make(op, seed)
        with torch.no_grad():
            for mine, theirs in zip(call.inputs, other.inputs, strict=True):
                mine.copy_(theirs)
        want = [each.clone() for each in call.run()]
        for each in results:
            each.zero_()
        graph.replay()
        assert_same(results, want)


KERNELS = {
    "policy_loss": "loss_kernel",
    "grpo_loss": "loss_kernel",
    "iqr_filter": "filter_kernel",
    "ema": "update_kernel",
}


@pytest.mark.device_only
@pytest.mark.parametrize("op", KERNELS)
def test_one_triton_kernel(op, record_property):
    """Whatever else appears (memsets, offsets, the factors of backward) is written down: it is no part of the promise."""
    call = CALLS[op](SIZES._replace(tensors=1000, numel=1001), DEVICE)
    work = device_work(call.run)
    record_property("kernels", {name: number for name, (number, _) in work.items()})
    ours = {name: number for name, (number, _) in work.items() if KERNELS[op] in name}
    assert sum(ours.values()) == 1, f"expected one {KERNELS[op]}, got {work}"
    triton_kernels = [name for name in work if name.endswith("_kernel") and "::" not in name and "<" not in name]
    assert triton_kernels == list(ours), f"expected no other Triton kernel, got {triton_kernels}"


def head_stats(rows):
    hidden, weight = (
        torch.randn(rows, 16, device=DEVICE).requires_grad_(),
        torch.randn(300, 16, device=DEVICE).requires_grad_(),
    )
    labels = torch.randint(0, 300, (rows,), device=DEVICE)

    def function(hidden, weight, labels):
        stats = linear_token_stats(hidden, weight, labels, backend="triton")
        return stats.logprob.sum() + 0.1 * stats.entropy.sum()

    return function, (hidden, weight, labels)


def logit_stats(rows):
    logits, labels = (
        torch.randn(rows, 300, device=DEVICE).requires_grad_(),
        torch.randint(0, 300, (rows,), device=DEVICE),
    )

    def function(logits, labels):
        stats = token_stats_from_logits(logits, labels, backend="triton")
        return stats.logprob.sum() + 0.1 * stats.entropy.sum()

    return function, (logits, labels)


def loss(rows):
    logprobs, old = (torch.randn(rows, 10, device=DEVICE) * 0.1 for _ in range(2))

    def function(logprobs, old, advantages):
        return policy_loss(logprobs, old, advantages, loss_type="dapo", backend="triton").loss

    return function, (logprobs.requires_grad_(), old, torch.randn(rows, device=DEVICE))


def keep(rows):
    return lambda entropy: iqr_filter(entropy, 4, backend="triton").lower.sum(), (torch.rand(4 * rows, device=DEVICE),)


def momentum(rows):
    def function(ema, param):
        ema_update_([ema], [param], 0.9, backend="triton")
        return ema.sum()

    return function, (torch.ones(rows, 5, device=DEVICE), torch.randn(rows, 5, device=DEVICE))


@pytest.mark.parametrize("make_case", [logit_stats, head_stats, loss, keep, momentum], ids=lambda case: case.__name__)
def test_compiles_whole_and_recompiles_once(make_case):
    torch.compiler.reset()
    counter = CompileCounterWithBackend(pick("inductor", "aot_eager"))
    compiled = None
    for rows in (4, 6, 9, 13):
        torch.manual_seed(rows)
        function, arguments = make_case(rows)
        compiled = torch.compile(function, fullgraph=True, backend=counter) if compiled is None else compiled
        copies = [each.detach().clone().requires_grad_(each.requires_grad) for each in arguments]
        results = []
        for run, inputs in ((compiled, arguments), (function, copies)):
            output = run(*inputs)
            leaves = [each for each in inputs if each.requires_grad]
            results.append([output.detach(), *(torch.autograd.grad(output, leaves) if leaves else [])])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2


def test_the_device_is_meant():
    """The path for masks that a GPU takes is the one that was tested."""
    assert not _rows.can_read(DEVICE)
    assert (DEVICE == CPU) == ON_CPU
    assert SIZES.rows % SEQUENCES == 0
