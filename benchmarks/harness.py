"""What the benchmarks share: real heads, honest clocks, ceilings measured beside the op, truth to check against, memory.

`measure` refuses a result that is not the reference's before it takes a time. A time is one call: on a GPU between two device
events with the L2 cache flushed before, on a CPU the wall clock's. A ratio is the median over pairs, ceiling and op in turn, so
that a slow minute of a shared machine hits both. Passes: ``forward`` without gradient, ``backward`` alone (a fresh graph for
each round is built outside the clock), ``both``. MGRPO_BENCH_SMALL=1 shrinks every shape, to try the benchmarks themselves.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peers
import pytest
import torch
from torch import Tensor

from mgrpo_kernels import linear_token_stats, policy_loss

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SMALL = os.environ.get("MGRPO_BENCH_SMALL") == "1"


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
if SMALL:
    HEADS = dict.fromkeys(HEADS, Head(64, 1000))


def size(full: int, small: int) -> int:
    return small if SMALL else full


TOKENS = size(8192 if GPU else 1024, 64)
SEQUENCES = 8  # that the policy losses cut the tokens into
HERE = list(HEADS) if GPU else ["qwen2.5-0.5b"]  # the others take a CPU minutes, and show nothing else
DTYPES = ["bfloat16"] if GPU else ["bfloat16", "float32"]  # nobody trains a float32 head on a GPU
STEPS = ["forward", "backward", "both"]
MAIN_SHAPE = "qwen2.5-7b"  # of `make gpu-check`
MAIN_PEERS = (
    "ours",
    "eager",
    "trl",
    "liger",
    "cce",
    "verl",
    "torch",
    "quack",
    "flash-attn",
)  # those that are installed there
SECONDS = 0.02 if SMALL else 1.0 if GPU else 4.0  # of rounds for a row of a table
TOLERANCE = {
    torch.bfloat16: 2e-2,
    torch.float32: 1e-4,
}  # relative error, root mean square: a few roundings of the dtype


def rows(op: str, shapes: Sequence[str] = HERE, dtypes: Sequence[str] = DTYPES, steps: Sequence[str] = STEPS) -> list:
    """Return the parameters (shape, dtype, provider, step) of an op's benchmark.

    A CPU leaves out what takes it minutes and says little more: all but ``both`` of a provider that is slow there or computes a
    part only, the latter and backward alone in float32, and there of the losses all but ``both``.
    """
    cases = []
    for shape in shapes:
        for dtype in dtypes:
            for peer in sorted(
                peers.PEERS[op].values(), key=lambda peer: peer.computes
            ):  # the truth is kept from row to row
                part = peer.computes == "logprob"
                if not GPU and dtype == "float32" and part and not peer.slow_on_cpu:
                    continue
                for step in steps:
                    few = part or peer.slow_on_cpu or (dtype == "float32" and peer.computes == "loss")
                    if not GPU and step != "both" and (few or (dtype == "float32" and step == "backward")):
                        continue
                    main = shape == MAIN_SHAPE and dtype == "bfloat16" and peer.name.startswith(MAIN_PEERS)
                    cases.append(
                        pytest.param(
                            shape, dtype, peer.name, step, id=f"{shape}-{dtype}-{peer.name}-{step}",
                            marks=[pytest.mark.gpu_check] if main else [],
                        )
                    )  # fmt: skip
    return cases


def simple_rows(op: str) -> list:
    """Return the parameter (provider) of an op that has one shape."""
    return [
        pytest.param(name, marks=[pytest.mark.gpu_check] if name.startswith(MAIN_PEERS) else [])
        for name in peers.PEERS[op]
    ]


def available(op: str, provider: str) -> peers.Peer:
    """Return the provider, or skip with the reason why it cannot run here."""
    peer = peers.PEERS[op][provider]
    why = peer.unavailable(DEVICE)
    if why is not None:
        pytest.skip(why)
    return peer


def room_for(what: str, wanted: float) -> None:
    """Skip what would not fit in memory."""
    if GPU:
        free = torch.cuda.mem_get_info()[0]
    else:
        free = int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    if wanted > 0.9 * free:
        pytest.skip(f"{what} needs about {wanted / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")


# Inputs and truth. Both are kept from row to row: they take a CPU longer than many a row.


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)


@functools.lru_cache(maxsize=1)
def head_inputs(head: str, dtype: torch.dtype, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden ``(N, H)``, weight ``(V, H)`` and labels ``(N,)``: logits of about the spread that real ones have."""
    torch.manual_seed(0)
    width, vocab = HEADS[head]
    hidden = torch.randn(tokens, width, device=DEVICE).to(dtype)
    weight = torch.empty(vocab, width, device=DEVICE).normal_(std=2.5 * width**-0.5).to(dtype)
    return hidden, weight, torch.randint(0, vocab, (tokens,), device=DEVICE)


@functools.lru_cache(maxsize=1)
def loss_inputs(head: str, dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor]:
    """Return old log-probs ``(B, L)`` close to the head's own, and advantages ``(B,)``."""
    hidden, weight, labels = head_inputs(head, dtype, tokens)
    with torch.no_grad():
        logprob = linear_token_stats(hidden, weight, labels, stats=("logprob",)).logprob
    assert logprob is not None
    return old_and_advantages(logprob.view(SEQUENCES, -1))


def old_and_advantages(logprob: Tensor) -> tuple[Tensor, Tensor]:
    """Return old log-probs ``(B, L)`` close to these, and advantages ``(B,)``, in float32."""
    torch.manual_seed(1)
    # Ratios well inside the clip range or well outside: at its edge 16-bit rounding decides a token's whole gradient.
    far = torch.where(torch.rand_like(logprob) < 0.25, 0.5, 0.05) * torch.randn_like(logprob).sign()
    # Mostly of one sign: a loss near 0 would have no relative error to speak of.
    return logprob + far, 1.0 + 0.5 * torch.randn(SEQUENCES, device=DEVICE)


class Truth(NamedTuple):
    """What a provider must give, in float32: by the reference backend, or where that takes a CPU minutes by its formulas."""

    outputs: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]  # gradients of the outputs
    grads: tuple[Tensor, ...]


def _log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.log_softmax(hidden.float() @ weight.t(), -1)


def _through_head(head: str, dtype: torch.dtype, tokens: int, upstream: tuple[Tensor, ...]) -> Truth:
    """Return log-prob (and entropy, if it has an upstream gradient), and the gradients that `upstream` gives, in slices of rows.

    The formulas of ``linear_token_stats``, held to its reference backend in tests/test_benchmarks.py.
    """
    hidden, weight, labels = head_inputs(head, dtype, tokens)
    weight = weight.float()
    outputs, grad_hidden, grad_weight = [], [], torch.zeros_like(weight)
    for rows in torch.arange(tokens, device=DEVICE).split(256):
        logp = _log_softmax(hidden[rows], weight)  # (256, V)
        label = labels[rows].unsqueeze(-1)
        probs = logp.exp()
        grad = probs * -upstream[0][rows].unsqueeze(-1)
        grad.scatter_add_(-1, label, upstream[0][rows].unsqueeze(-1))
        outputs.append([logp.gather(-1, label).squeeze(-1)])
        if len(upstream) > 1:
            entropy = -torch.linalg.vecdot(probs, logp)
            grad -= probs * (logp + entropy.unsqueeze(-1)) * upstream[1][rows].unsqueeze(-1)
            outputs[-1].append(entropy)
        grad_hidden.append(grad @ weight)
        grad_weight.addmm_(grad.t(), hidden[rows].float())
    return Truth(tuple(map(torch.cat, zip(*outputs, strict=True))), upstream, (torch.cat(grad_hidden), grad_weight))


@functools.lru_cache(maxsize=1)
def stats_truth(head: str, dtype: torch.dtype, tokens: int, computes: str) -> Truth:
    """Return the truth of ``linear_token_stats``; of the log-prob alone the upstream gradient is 1, as a sum has it."""
    torch.manual_seed(2)
    upstream = (torch.ones(tokens, device=DEVICE),)
    if "entropy" in computes:
        upstream = torch.randn(tokens, device=DEVICE), torch.randn(tokens, device=DEVICE)
    return _through_head(head, dtype, tokens, upstream)


@functools.lru_cache(maxsize=1)
def loss_truth(head: str, dtype: torch.dtype, tokens: int) -> Truth:
    """Return the truth of ``linear_policy_loss``, of the clipped loss averaged over tokens ("dapo")."""
    hidden, weight, labels = head_inputs(head, dtype, tokens)
    weight = weight.float()
    old, advantages = loss_inputs(head, dtype, tokens)
    parts = [
        _log_softmax(hidden[rows], weight).gather(-1, labels[rows].unsqueeze(-1))
        for rows in torch.arange(tokens, device=DEVICE).split(256)
    ]
    logprob = torch.cat(parts).view_as(old).requires_grad_()
    loss = policy_loss(logprob, old, advantages, loss_type="dapo", backend="reference").loss
    (upstream,) = torch.autograd.grad(loss, logprob)
    truth = _through_head(head, dtype, tokens, (upstream.flatten(),))
    return Truth((loss.detach(),), (torch.ones_like(loss),), truth.grads)


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: str = "result") -> None:
    """Refuse a wrong result before its time counts, by the root mean square of its error over that of the truth."""
    assert got.numel() == want.numel(), f"{what}: want {want.numel()} values, got {got.numel()}: no time is taken"
    want = want.float()
    error = ((got.float().reshape(want.shape) - want).norm() / want.norm()).item()
    assert error <= tolerance, (  # a NaN is not
        f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}: no time is taken of a wrong result"
    )


def check_against(truth: Truth, tolerance: float) -> Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], None]:
    """Return a check of outputs and gradients (none, if only forward is timed). A provider may give a sum instead of the rows."""

    def check(outputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> None:
        assert len(outputs) == len(truth.outputs), f"want {len(truth.outputs)} outputs, got {len(outputs)}"
        for i, (got, want) in enumerate(zip(outputs, truth.outputs, strict=True)):
            assert_close(got, want.sum() if got.dim() == 0 else want, tolerance, f"output {i}")
        for i, (got, want) in enumerate(zip(grads, truth.grads if grads else (), strict=True)):
            assert_close(got, want, tolerance, f"gradient {i}")

    return check


# Clocks


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


def pairs(function: Callable[[], object], ceiling: Callable[[], object], rounds: int) -> Iterator[tuple[float, float]]:
    """Yield the seconds of function and ceiling, in turn, after a warm-up."""
    function(), ceiling()
    for _ in range(rounds):
        base = clock(ceiling)
        yield clock(function), base


def paired_ratio(function: Callable[[], object], ceiling: Callable[[], object], rounds: int = 5) -> float:
    """Return the median of time(function) / time(ceiling) over interleaved pairs, after a warm-up."""
    return statistics.median(seconds / base for seconds, base in pairs(function, ceiling, rounds))


def percentile(samples: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the samples lie, interpolated as ``torch.quantile`` does."""
    return torch.tensor(samples, dtype=torch.float64).quantile(share).item()


def peak_memory(function: Callable[[], object]) -> int:
    """Return by how many bytes memory in use rises above where it was during one call.

    On a GPU by the allocator's account; on a CPU the resident size, looked at every millisecond.
    """
    gc.collect()
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


# Ceilings


def copy_of(count: float) -> Callable[[], object]:
    """Return a copy that moves `count` bytes, half of them read and half written, in pieces of at most 512 MiB."""
    piece = max(1, min(int(count / 2), size(2**29, 2**20)))
    times, rest = divmod(int(count / 2), piece)
    source, target = (
        torch.randint(0, 255, (piece,), dtype=torch.uint8, device=DEVICE),
        torch.empty(piece, dtype=torch.uint8, device=DEVICE),
    )

    def copy() -> None:
        for _ in range(times):
            target.copy_(source)
        if rest:
            target[:rest].copy_(source[:rest])

    return copy


def measure(
    benchmark: Any,
    step: str,
    forward: Callable[[], tuple[Tensor, ...]],
    leaves: Sequence[Tensor] = (),
    upstream: Sequence[Tensor] = (),
    *,
    check: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], None],
    ceiling: Callable[[], object],
    ceiling_name: str,
    ceilings: float = 1.0,
    patient: bool = False,
    **info: object,
) -> None:
    """Check one call, then time `step` of `forward` beside its ceiling, and record both in ``benchmark.extra_info``.

    Args:
        benchmark: pytest-benchmark's fixture. Its own figures are wall clock; on a GPU ``extra_info`` has the device's.
        step: "forward", "backward" or "both".
        forward: returns the outputs.
        leaves: what gradients are taken of; with `upstream`, the gradients of the outputs.
        check: raises if outputs or gradients are wrong.
        ceiling: work whose time, `ceilings` times, is the least possible (the matmuls of the pass; 0 leaves no share to speak of).
        patient: one call takes minutes: it alone is checked, looked at for memory, and timed.
        info: what the file's docstring gives a formula for: bytes, flops, gemms; shape; what is computed.
    """

    def graph() -> tuple[Tensor, ...] | None:
        return forward() if step == "backward" else None

    def run(outputs: tuple[Tensor, ...] | None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if step == "forward":
            with torch.no_grad():
                return forward(), ()
        outputs = forward() if outputs is None else outputs
        given = [
            torch.ones_like(out) if out.dim() == 0 else grad.view_as(out).to(out.dtype)
            for grad, out in zip(upstream, outputs, strict=True)
        ]
        return outputs, torch.autograd.grad(outputs, leaves, given)

    samples: list[float] = []
    ratios: list[float] = []
    memory, once, result = 0, 0.0, ((), ())

    def first() -> None:
        nonlocal result
        result = run(graph())

    def second() -> None:
        nonlocal once
        begin = time.perf_counter()
        run(graph())
        synchronize()
        once = time.perf_counter() - begin

    if not patient:
        first()
        check(*result)
        result = ((), ())
        memory = peak_memory(second)  # backward: of forward and backward, or what forward keeps would not be seen
    ceiling()

    def setup() -> tuple[tuple[object, float], dict[str, object]]:
        base = clock(ceiling)
        return (None if patient else graph(), base), {}

    def target(outputs: tuple[Tensor, ...] | None, base: float) -> None:
        nonlocal memory
        if patient:
            memory = peak_memory(lambda: samples.append(clock(first)))
        else:
            samples.append(clock(lambda: run(outputs)))
        ratios.append(samples[-1] / base)

    rounds = 1 if patient or once > 4 * SECONDS else max(3, min(50, int(SECONDS / max(once, 1e-9))))
    benchmark.pedantic(target, setup=setup, rounds=rounds)
    if patient:
        check(*result)
    ratio = statistics.median(ratios)
    benchmark.extra_info.update(
        p20_ms=1e3 * percentile(samples, 0.2), p50_ms=1e3 * percentile(samples, 0.5), p80_ms=1e3 * percentile(samples, 0.8),
        rounds=rounds, ratio=ratio, ceiling=ceiling_name, share_of_ceiling=ceilings / ratio if ceilings else None,
        peak_memory_bytes=memory, **info,
    )  # fmt: skip
