"""From hidden states to the policy loss, with gradients. FLOP: 2 N V H a matmul, 3 of them fused, 4 composed."""

import pytest
import torch
from harness import GPU, HEADS, HERE, ROUNDS, TOKENS, assert_close, dtype_of, head_inputs, measure

from mgrpo_kernels import linear_policy_loss, linear_token_stats, policy_loss

SEQUENCES = 8


def fused(hidden, weight, labels, old, advantages):
    return linear_policy_loss(hidden, weight, labels, old, advantages, loss_type="dapo").loss


def composed(hidden, weight, labels, old, advantages):
    stats = linear_token_stats(hidden, weight, labels)
    return policy_loss(stats.logprob, old, advantages, entropy=stats.entropy.detach(), loss_type="dapo").loss


def eager(hidden, weight, labels, old, advantages):
    logp = torch.log_softmax((hidden @ weight.t()).float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    ratio = (logp - old).exp()
    advantages = advantages.unsqueeze(1)
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


PROVIDERS = {"ours": fused, "composed": composed, "eager": eager, "compile": torch.compile(eager)}


@pytest.mark.parametrize("shape", HERE)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_linear_policy_loss(benchmark, shape, dtype, provider):
    if GPU and dtype == "float32":
        pytest.skip("nobody trains a float32 head on a GPU")
    width, vocab = HEADS[shape]
    hidden, weight, labels = head_inputs(shape, dtype_of(dtype))
    hidden, labels = hidden.view(SEQUENCES, -1, width), labels.view(SEQUENCES, -1)
    with torch.no_grad():
        old = linear_token_stats(hidden, weight, labels).logprob + 0.1 * torch.randn(labels.shape, device=labels.device)
    advantages = torch.randn(SEQUENCES, device=labels.device)
    hidden.requires_grad_(), weight.requires_grad_()
    function = PROVIDERS[provider]

    def run(function=function):
        return torch.autograd.grad(function(hidden, weight, labels, old, advantages), (hidden, weight))

    if provider != "eager":
        for got, want in zip(run(), run(eager), strict=True):
            assert_close(got, want, 1e-3 if dtype == "float32" else 5e-2)
    fuses = provider == "ours" and (GPU or dtype == "float32")
    gemms = 4 if provider in ("ours", "composed") and not fuses else 3
    measure(
        benchmark, run, ceiling=lambda: hidden.detach() @ weight.detach().t(), ceiling_name="matmul", rounds=ROUNDS,
        gemms=gemms,
        flops=2.0 * TOKENS * width * vocab * gemms, gradient_bytes=(hidden.numel() + weight.numel()) * hidden.element_size(),
    )  # fmt: skip
