"""The policy loss on a real model's own responses, with an advantage of 0 for half of the sequences, in units of ``hidden @ weight.T``."""

import pytest
import torch
from bench_real_rollouts import PROVIDERS, load
from timing import GPU, measure

from mgrpo_kernels import linear_policy_loss

OP = "loss_of_real_rollouts"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("provider", ["ours", "ours, tolerance 2^-8"])
def bench_loss_of_real_rollouts(benchmark, provider, dtype):
    hidden, labels = load()["rollouts"][1.0]
    device = "cuda" if GPU else "cpu"
    leaves = [each.to(device, getattr(torch, dtype)).requires_grad_() for each in (hidden, load()["weight"])]
    labels = labels.to(device)
    matmul = leaves[0].detach(), leaves[1].detach().t()
    offsets = torch.linspace(0, len(labels), 9, device=device).int()
    advantages = torch.tensor([1.0, 0.0, -1.0, 0.0, 0.5, 0.0, -0.5, 0.0], device=device)

    def call():
        return (
            linear_policy_loss(
                *leaves, labels, None, advantages, cu_seqlens=offsets, gradient_tolerance=PROVIDERS[provider]
            ).loss,
        )

    def check(results, gradients):
        dead = (advantages.repeat_interleave(offsets.diff()) == 0).to(gradients[0].device)
        assert (gradients[0][dead] == 0).all()
        assert all(each.isfinite().all() for each in gradients)

    measure(
        benchmark,
        "both",
        call,
        leaves,
        (torch.ones((), device=device),),
        provider=provider,
        check=check,
        ceiling=lambda: matmul[0] @ matmul[1],
        ceiling_name="matmul",
        ceilings=3,
        ours=None,
        computes="loss",
        tokens=len(labels),
    )
