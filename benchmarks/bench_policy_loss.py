"""Group advantages and the clipped loss with a KL penalty. Bytes: 3 inputs forward; backward reads them and writes 1, 4 each.

The ceiling is a copy of that many bytes.
"""

import pytest
import torch
from harness import STEPS, Truth, available, beside, check_against, copy_of, simple_rows
from peers import KL_COEF
from timing import DEVICE, GPU, SMALL, measure, size

from mgrpo_kernels import grpo_loss

OP = "policy_loss"
ROLLOUTS, LENGTH, GROUP = size(256, 16), size(2048, 32), 8


@pytest.mark.parametrize("provider", simple_rows(OP))
@pytest.mark.parametrize("step", STEPS if GPU or SMALL else ["both"])
def bench_policy_loss(benchmark, provider, step):
    peer = available(OP, provider)
    torch.manual_seed(0)
    logprobs = torch.randn(ROLLOUTS, LENGTH, device=DEVICE) - 1
    old, ref = (logprobs + 0.1 * torch.randn_like(logprobs) for _ in range(2))
    rewards = (torch.rand(ROLLOUTS, device=DEVICE) > 0.5).float()
    leaf = logprobs.requires_grad_()
    loss = grpo_loss(
        leaf, old, rewards, GROUP, ref_logprobs=ref, kl_coef=KL_COEF, loss_type="dapo", backend="reference"
    ).loss
    truth = Truth((loss.detach(),), (torch.ones_like(loss),), torch.autograd.grad(loss, leaf))
    moved = {"forward": 12, "backward": 16, "both": 28}[step] * logprobs.numel()

    def call(function):
        return lambda: function(leaf, old, ref, rewards, GROUP)

    measure(
        benchmark,
        step,
        call(peer.function),
        (leaf,),
        truth.upstream,
        provider=provider,
        ours=beside(OP, peer, call),
        check=check_against(truth, 1e-4),
        ceiling=copy_of(moved),
        ceiling_name="copy",
        bytes=moved,
        computes=peer.computes,
        tokens=logprobs.numel(),
        gradient_bytes=0 if step == "forward" else 4 * logprobs.numel(),
    )
