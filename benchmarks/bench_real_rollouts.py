"""The head on a real model's own responses: exact gradients, and gradients to a tolerance of 2^-8.

In units of the bare ``hidden @ weight.T``. The statistic is the log-prob. `errors` are those of the gradients of hidden and weight, against
float64. The responses are made by ``python scripts/real_rollouts.py``; the rows are skipped where that has not run.
"""

import functools
from pathlib import Path

import pytest
import torch
from timing import GPU, SMALL, measure

from mgrpo_kernels import linear_token_stats

OP = "real_rollouts"
FILE = Path(__file__).resolve().parents[1] / "build" / "real_rollouts.pt"
TOLERANCE = 2.0**-8
PROVIDERS = {"ours": None, "ours, tolerance 2^-8": TOLERANCE, "eager": None, "compile": None}


@functools.cache
def load():
    """Return the weight, and for each temperature hidden states and tokens."""
    if SMALL:  # where only the harness is tried
        torch.manual_seed(0)
        return {
            "weight": 0.3 * torch.randn(1000, 64),
            "rollouts": dict.fromkeys((1.0, 0.6), (torch.randn(64, 64), torch.arange(64))),
        }
    if not FILE.exists():
        pytest.skip("needs build/real_rollouts.pt, which python scripts/real_rollouts.py makes")
    return torch.load(FILE)


@functools.lru_cache(maxsize=1)
def truth(temperature):
    """Return the log-probs, and the gradients of their sum by hidden and weight, in float64."""
    hidden, labels = load()["rollouts"][temperature]
    leaves = [each.double().requires_grad_() for each in (hidden, load()["weight"])]
    logprob = plain(*leaves, labels, temperature)
    return logprob.detach(), torch.autograd.grad(logprob.sum(), leaves)


def plain(hidden, weight, labels, temperature):
    logits = hidden @ weight.t() / temperature
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("step", ["forward", "both"])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_real_rollouts(benchmark, provider, step, temperature, dtype):
    hidden, labels = load()["rollouts"][temperature]
    device = "cuda" if GPU else "cpu"
    leaves = [
        each.to(device, getattr(torch, dtype)).requires_grad_(step == "both") for each in (hidden, load()["weight"])
    ]
    labels = labels.to(device)
    matmul = leaves[0].detach(), leaves[1].detach().t()
    compiled = torch.compile(plain, dynamic=False) if provider == "compile" else plain
    errors = {}

    def ours(tolerance):
        return lambda: linear_token_stats(
            *leaves, labels, stats=("logprob",), temperature=temperature, gradient_tolerance=tolerance
        )[:1]

    def call():
        if provider.startswith("ours"):
            return ours(PROVIDERS[provider])()
        return (compiled(*leaves, labels, temperature),)

    def check(results, gradients):
        want, want_gradients = truth(temperature)
        rounding = 0.05 if dtype == "bfloat16" else 1e-3
        assert (results[0].detach().double().cpu() - want).square().mean().sqrt() < rounding
        for name, got, each in zip(("hidden", "weight"), gradients or (), want_gradients, strict=False):
            errors[name] = ((got.double().cpu() - each).norm() / each.norm()).item()
            assert errors[name] < TOLERANCE + rounding

    measure(
        benchmark,
        step,
        call,
        leaves,
        (torch.ones(len(labels), device=device),) if step == "both" else (),
        provider=provider,
        check=check,
        ceiling=lambda: matmul[0] @ matmul[1],
        ceiling_name="matmul",
        ceilings=1 if step == "forward" else 3,
        ours=None if provider.startswith("ours") else ("ours, tolerance 2^-8", ours(TOLERANCE)),
        computes="logprob",
        tokens=len(labels),
    )
    benchmark.extra_info["errors"] = dict(errors)
