"""Log-prob and entropy from logits. Bytes: the logits once forward; backward reads them and writes their gradient.

The ceiling is a copy of that many bytes; for forward on a CPU, which reads faster than it copies, ``logits.sum()``.
"""

import functools

import pytest
import torch
from harness import (
    HEADS,
    TOLERANCE,
    Truth,
    available,
    beside,
    check_against,
    copy_of,
    dtype_of,
    room_for,
    rows,
)
from timing import DEVICE, GPU, measure, size

from mgrpo_kernels import token_stats_from_logits

OP = "token_stats"
ROWS = size(8192 if GPU else 512, 32)
SHAPES = ["qwen2.5-7b", "llama3-8b"] if GPU else ["qwen2.5-0.5b"]


@functools.lru_cache(maxsize=1)
def inputs(shape, dtype, count):
    torch.manual_seed(0)
    vocab = HEADS[shape].vocab
    logits = (torch.randn(count, vocab, device=DEVICE) * 2.5).to(dtype)
    return logits, torch.randint(0, vocab, (count,), device=DEVICE)


def truth_of(logits, labels, computes):
    """By the reference backend in float32, every 16th row: gradients of a row depend on no other."""
    some = logits[::16].float().requires_grad_()
    names = ("logprob", "entropy") if "entropy" in computes else ("logprob",)
    stats = token_stats_from_logits(some, labels[::16], stats=names, backend="reference")
    outputs = tuple(getattr(stats, name) for name in names)
    torch.manual_seed(1)
    upstream = tuple(torch.randn(len(logits), device=DEVICE) for _ in outputs)
    grads = torch.autograd.grad(outputs, some, [each[::16] for each in upstream])
    return Truth(tuple(each.detach() for each in outputs), upstream, grads)


@pytest.mark.parametrize(("shape", "dtype", "provider", "step"), rows(OP, SHAPES, ["bfloat16", "float32"]))
def bench_token_stats(benchmark, shape, dtype, provider, step):
    peer = available(OP, provider)
    logits, labels = inputs(shape, dtype_of(dtype), ROWS)
    if provider.startswith(("eager", "compile")):
        room_for(f"{provider} at {ROWS} rows", logits.numel() * 16)
    truth = truth_of(logits, labels, peer.computes)
    compare = check_against(truth, TOLERANCE[logits.dtype])
    leaf = logits.detach().requires_grad_(step != "forward")
    once = logits.numel() * logits.element_size()
    moved = {"forward": once, "backward": 2 * once, "both": 3 * once}[step]
    reads_only = step == "forward" and not GPU

    def call(function):
        return lambda: function(leaf, labels)

    measure(
        benchmark,
        step,
        call(peer.function),
        (leaf,),
        truth.upstream,
        provider=provider,
        ours=beside(OP, peer, call),
        check=lambda outputs, grads: compare(tuple(out[::16] for out in outputs), tuple(grad[::16] for grad in grads)),
        ceiling=logits.sum if reads_only else copy_of(moved),
        ceiling_name="sum" if reads_only else "copy",
        bytes=moved,
        computes=peer.computes,
        tokens=ROWS,
        gradient_bytes=0 if step == "forward" else once,
    )
