"""Peaks of memory at the size of a real head, and more than 2^31 elements. On a GPU of 32 GB or more; nothing smaller would tell."""

import pytest
import torch
from on_device import DEVICE

from mgrpo_kernels import linear_policy_loss, linear_token_stats, token_stats_from_logits

pytestmark = pytest.mark.device_only

N, H, V = 8192, 3584, 152064  # Qwen2.5-7B
MIB = 2**20
SMALL_CHANGE = (
    40 * MIB
)  # statistics and states, a few dozen bytes for each row; and the library's matmul takes up to 32 MiB


@pytest.fixture
def head():
    torch.manual_seed(0)
    hidden = torch.randn(N, H, device=DEVICE).bfloat16().requires_grad_()
    weight = torch.empty(V, H, device=DEVICE, dtype=torch.bfloat16).normal_(std=2.5 * H**-0.5).requires_grad_()
    mask = torch.rand(N, device=DEVICE) > 0.1
    return hidden, weight, torch.randint(0, V, (N,), device=DEVICE), mask


def peak(function):
    """Return the bytes that memory in use rose by during a second call: the first compiles, and gives the library its workspace."""
    function()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


GRADIENTS = 2 * (N * H + V * H) + 4 * N * H  # as returned, and that of hidden in float32 before it is rounded
MASKED_HIDDEN = 2 * N * H  # hidden states without what masked rows hold


def within(bytes_used, allowed, what, record_property):
    record_property(what, {"MiB": round(bytes_used / MIB, 1), "allowed MiB": round(allowed / MIB, 1)})
    assert bytes_used <= allowed + SMALL_CHANGE, f"{what}: {bytes_used / MIB:.0f} MiB, allowed {allowed / MIB:.0f}"


@pytest.mark.parametrize("masked", [False, True])
def test_linear_token_stats(head, masked, record_property):
    hidden, weight, labels, mask = head
    mask = mask if masked else None

    def forward():
        with torch.no_grad():
            linear_token_stats(hidden, weight, labels, mask=mask)

    def both():
        stats = linear_token_stats(hidden, weight, labels, mask=mask)
        torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), (hidden, weight))

    within(peak(forward), 512 * MIB, "workspace forward", record_property)
    extra = MASKED_HIDDEN if masked else 0
    within(peak(both) - GRADIENTS - extra, 512 * MIB, "workspace forward and backward", record_property)


@pytest.mark.parametrize("masked", [False, True])
def test_linear_policy_loss(head, masked, record_property):
    hidden, weight, labels, mask = head
    labels, mask = labels.view(8, -1), mask.view(8, -1) if masked else None
    old, advantages = torch.full_like(labels, -10.0, dtype=torch.float32), torch.randn(8, device=DEVICE)

    def both():
        loss = linear_policy_loss(
            hidden.view(8, -1, H), weight, labels, old, advantages, mask=mask, loss_type="dapo"
        ).loss
        torch.autograd.grad(loss, (hidden, weight))

    accumulator = 4 * V * H
    extra = MASKED_HIDDEN if masked else 0
    within(peak(both) - GRADIENTS - extra, 512 * MIB + accumulator, "workspace and accumulator", record_property)


def test_more_than_2_to_31_elements():
    """The rows around element 2^31 and the last one, against plain PyTorch on those rows alone; the gradient in their place."""
    rows, vocab = 16384, 151936
    torch.manual_seed(0)
    leaf = torch.empty(rows, vocab, device=DEVICE, dtype=torch.bfloat16)
    for part in leaf.split(1024):
        part.normal_(std=2.5)
    labels = torch.randint(0, vocab, (rows,), device=DEVICE)
    middle = 2**31 // vocab
    some = torch.tensor([0, 1, middle - 1, middle, middle + 1, rows - 2, rows - 1], device=DEVICE)
    few = leaf[some].float().requires_grad_()
    logits = leaf.requires_grad_().view_as(leaf)  # an op's output, in the leaf's memory
    upstream = torch.randn(2, rows, device=DEVICE)

    stats = token_stats_from_logits(logits, labels, inplace_backward=True)
    (grad,) = torch.autograd.grad((stats.logprob, stats.entropy), logits, tuple(upstream))
    assert grad.data_ptr() == leaf.data_ptr()

    logp = torch.log_softmax(few, -1)
    want = logp.gather(-1, labels[some].unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)
    (want_grad,) = torch.autograd.grad(want, few, tuple(upstream[:, some]))
    for got, each in zip((stats.logprob, stats.entropy), want, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got[some], each.detach(), rtol=1e-5, atol=1e-5)
    assert grad[some].isfinite().all()
    torch.testing.assert_close(grad[some].float(), want_grad, rtol=1e-2, atol=1e-8)
