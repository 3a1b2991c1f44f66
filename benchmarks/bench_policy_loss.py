"""Group advantage and clipped loss, forward and backward, over a large batch of tokens. Bytes: 3 inputs, 1 gradient, 4 each."""

import pytest
import torch
from harness import DEVICE, assert_close, measure

from mgrpo_kernels import grpo_loss

ROLLOUTS, LENGTH, GROUP = 256, 2048, 8


def ours(logprobs, old, ref, rewards):
    return grpo_loss(logprobs, old, rewards, GROUP, ref_logprobs=ref, kl_coef=0.005, loss_type="dapo").loss


def eager(logprobs, old, ref, rewards):
    grouped = rewards.view(-1, GROUP)
    advantages = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-6)).view(-1, 1)
    ratio = (logprobs - old).exp()
    difference = ref - logprobs
    kl = difference.exp() - difference - 1
    return (-torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) + 0.005 * kl).mean()


PROVIDERS = {"ours": ours, "eager": eager, "compile": torch.compile(eager)}


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_policy_loss(benchmark, provider):
    torch.manual_seed(0)
    logprobs = (torch.randn(ROLLOUTS, LENGTH, device=DEVICE) - 1).requires_grad_()
    old, ref = (
        logprobs.detach() + 0.1 * torch.randn_like(logprobs),
        logprobs.detach() + 0.1 * torch.randn_like(logprobs),
    )
    rewards = (torch.rand(ROLLOUTS, device=DEVICE) > 0.5).float()

    def run(function=PROVIDERS[provider]):
        return torch.autograd.grad(function(logprobs, old, ref, rewards), logprobs)[0]

    assert_close(run(), run(eager), 1e-4)
    measure(benchmark, run, ceiling=lambda: run(eager), ceiling_name="eager", bytes=16 * logprobs.numel())
