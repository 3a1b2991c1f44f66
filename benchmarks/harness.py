"""What the benchmarks share: real heads, the rows to be timed, inputs, ceilings, and the truth that a result is checked against.

How a row is timed is in timing.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import peers
import pytest
import torch
from timing import DEVICE, GPU, SMALL, Check, size
from torch import Tensor

from mgrpo_kernels import linear_token_stats, policy_loss


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

TOKENS = size(8192 if GPU else 512, 64)
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
TOLERANCE = {
    torch.bfloat16: 2e-2,
    torch.float32: 1e-4,
}  # relative error, root mean square: a few roundings of the dtype


def rows(op: str, shapes: Sequence[str] = HERE, dtypes: Sequence[str] = DTYPES, steps: Sequence[str] = STEPS) -> list:
    """Return the parameters (shape, dtype, provider, step) of an op's benchmark.

    A CPU leaves out what takes it minutes and says little more (see `worth_it_on_a_cpu`), but for small shapes.
    """
    cases = []
    for shape in shapes:
        for dtype in dtypes:
            for peer in sorted(
                peers.PEERS[op].values(), key=lambda peer: peer.computes
            ):  # the truth is kept from row to row
                for step in steps:
                    if not (GPU or SMALL or worth_it_on_a_cpu(op, peer, dtype, step)):
                        continue
                    main = shape == MAIN_SHAPE and dtype == "bfloat16" and peer.name.startswith(MAIN_PEERS)
                    cases.append(
                        pytest.param(
                            shape,
                            dtype,
                            peer.name,
                            step,
                            id=f"{shape}-{dtype}-{peer.name}-{step}",
                            marks=[pytest.mark.gpu_check] if main else [],
                        )
                    )
    return cases


def worth_it_on_a_cpu(op: str, peer: peers.Peer, dtype: str, step: str) -> bool:
    """Return whether a CPU times the row, so that all of them take it less than 20 minutes. Backward alone it times of none."""
    if step == "backward" or peer.name == "ours, composed":
        return False
    if peer.name == "ours, logits stored":
        return step == "both"
    if peer.computes == "logprob":  # a part of an op; of a head, where that is all that the peer has, and ours
        all_it_has = not peer.name.endswith(", logprob") or peer.name == "ours, logprob"
        return step == "both" and dtype == "bfloat16" and (op == "token_stats" or all_it_has)
    if peer.computes == "loss" or (op == "linear_token_stats" and dtype == "float32"):
        return step == "both"
    return True


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


def beside(op: str, peer: peers.Peer, call: Callable[[Callable], Callable]) -> tuple[str, Callable] | None:
    """Return the name of ours that computes what the peer does, and its call, as `measure` takes them."""
    ours = peers.counterpart(op, peer)
    return None if ours is None else (ours.name, call(ours.function))


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
    assert got.numel() == want.numel(), f"{what}: expected {want.numel()} values, got {got.numel()}: no time is taken"
    want = want.float()
    error = ((got.float().reshape(want.shape) - want).norm() / want.norm()).item()
    assert error <= tolerance, (  # a NaN is not
        f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}: no time is taken of a wrong result"
    )


def check_against(truth: Truth, tolerance: float) -> Check:
    """Return a check of outputs and gradients (none, if only forward is timed). A provider may give a sum instead of the rows."""

    def check(outputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> None:
        assert len(outputs) == len(truth.outputs), f"expected {len(truth.outputs)} outputs, got {len(outputs)}"
        for i, (got, want) in enumerate(zip(outputs, truth.outputs, strict=True)):
            assert_close(got, want.sum() if got.dim() == 0 else want, tolerance, f"output {i}")
        for i, (got, want) in enumerate(zip(grads, truth.grads if grads else (), strict=True)):
            assert_close(got, want, tolerance, f"gradient {i}")

    return check


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
