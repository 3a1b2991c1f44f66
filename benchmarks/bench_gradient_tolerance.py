"""Gradients to a tolerance beside exact ones, on rows that a trained policy could have: each is sure of a few tokens.

In units of the bare ``hidden @ weight.T``. The statistic is the log-prob. `error` is that of the gradients of hidden and weight, against
the exact ones.
"""

import functools

import pytest
import torch
from timing import GPU, SMALL, measure

from mgrpo_kernels import linear_token_stats

OP = "gradient_tolerance"
N, H, V = (64, 64, 3000) if SMALL else (8192, 3584, 152064) if GPU else (512, 576, 49152)
TOLERANCES = {"ours": None, "ours, tolerance 2^-8": 2.0**-8}


@functools.lru_cache(maxsize=1)
def head():
    """Return hidden states, weight and tokens in bfloat16: logits fall as a power of the token's rank, but for that of the row's own."""
    device = "cuda" if GPU else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(V, H, device=device, generator=generator).bfloat16()
    hidden = 0.01 * torch.randn(N, H, device=device, generator=generator)
    labels = torch.randint(0, min(1000, V), (N,), device=device, generator=generator)
    weight[:, 0] = -(1.0 + torch.arange(V, device=device)).log()
    hidden[:, 0] = 3.0
    hidden[:, 1:] += 12.0 / H * weight[labels, 1:]
    return hidden.bfloat16(), weight, labels


@pytest.mark.parametrize("provider", [pytest.param(name, marks=[pytest.mark.gpu_check]) for name in TOLERANCES])
def bench_gradient_tolerance(benchmark, provider):
    hidden, weight, labels = head()
    leaves = [each.detach().requires_grad_() for each in (hidden, weight)]
    errors = {}

    def ours(tolerance):
        return linear_token_stats(*leaves, labels, stats=("logprob",), gradient_tolerance=tolerance)[:1]

    def check(results, gradients):
        exact = ours(None)
        assert torch.equal(results[0], exact[0])
        for name, got, want in zip(
            ("hidden", "weight"), gradients, torch.autograd.grad(exact[0].sum(), leaves), strict=True
        ):
            errors[name] = ((got.float() - want.float()).norm() / want.float().norm()).item()
            assert errors[name] < 2.0**-8 + 0.01

    measure(
        benchmark,
        "both",
        lambda: ours(TOLERANCES[provider]),
        leaves,
        (torch.ones(N, device=hidden.device),),
        provider=provider,
        check=check,
        ceiling=lambda: hidden @ weight.t(),
        ceiling_name="matmul",
        ceilings=3,
        ours=None,
        computes="logprob",
        tokens=N,
        gemms=3,  # of exact gradients, with the logits held
        flops=2.0 * N * H * V * 3,
    )
    benchmark.extra_info["errors"] = dict(errors)
