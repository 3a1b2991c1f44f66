"""Each kernel once, small: what `make gpu-check` runs first, so that a kernel that does not work here is known within a minute."""

import dataclasses
from unittest import mock

import pytest
import torch
from calls import Sizes, sharp_head
from on_device import DEVICE, ON_CPU, hold, pick

from mgrpo_kernels import (
    ema_update_,
    group_advantages,
    grpo_loss,
    iqr_filter,
    linear_policy_loss,
    linear_token_stats,
    policy_loss,
    token_stats_from_logits,
)
from mgrpo_kernels.ops._triton import tuning
from mgrpo_kernels.ops.linear_token_stats import staircase, triton

ROWS, WIDTH, VOCAB = pick((64, 64, 5003), (8, 16, 301))
BOTH = ("logprob", "entropy")


def logits_and_labels(rows, vocab, *, grad, dtype=torch.float32):
    logits = torch.randn(rows, vocab).to(dtype).requires_grad_(grad)
    return {"logits": logits, "labels": torch.randint(0, vocab, (rows,))}


def stats(inputs, backend):
    return token_stats_from_logits(inputs["logits"], inputs["labels"], stats=BOTH, backend=backend)[:2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_stats_forward_and_backward(dtype):
    hold(stats, logits_and_labels(ROWS, VOCAB, grad=True, dtype=dtype))


def test_token_stats_of_one_long_row_in_parts():
    hold(stats, logits_and_labels(1, pick(151936, 9001), grad=False))


def head_inputs():
    return {
        "hidden": torch.randn(ROWS, WIDTH).bfloat16().requires_grad_(),
        "weight": (torch.randn(VOCAB, WIDTH) * 2.5 * WIDTH**-0.5).bfloat16().requires_grad_(),
        "labels": torch.randint(0, VOCAB, (ROWS,)),
    }


def head(inputs, backend):
    if backend == "plain":
        logits = torch.nn.functional.linear(inputs["hidden"], inputs["weight"]).float()
        return token_stats_from_logits(logits, inputs["labels"], stats=BOTH, backend="reference")[:2]
    return linear_token_stats(inputs["hidden"], inputs["weight"], inputs["labels"], stats=BOTH, backend=backend)[:2]


def test_head_with_the_librarys_matmul():
    hold(head, head_inputs(), plain="plain")


def test_head_with_our_own_matmul():
    chosen = dataclasses.replace(tuning.of(DEVICE), matmul="fused")
    if ON_CPU:
        chosen = dataclasses.replace(chosen, fused_tile=(16, 32, 16, 3, 4))
    with mock.patch.object(tuning, "of", return_value=chosen), mock.patch.object(triton, "FUSED_FROM", 1):
        hold(head, head_inputs(), plain="plain")


def test_head_to_a_tolerance():
    torch.manual_seed(0)
    hidden, weight, labels = sharp_head(Sizes(ROWS, 64, max(VOCAB, 1500), 0, 0), torch.device("cpu"))
    inputs = {"hidden": hidden, "weight": weight, "labels": labels}

    def function(inputs, backend):
        if backend != "triton":
            return head(inputs, backend)
        return linear_token_stats(**inputs, stats=BOTH, gradient_tolerance=2.0**-12, backend=backend)[:2]

    with mock.patch.object(staircase, "backward", side_effect=staircase.backward) as stairs:
        hold(function, inputs, plain="plain")
    assert stairs.call_count == 1


def test_head_over_kept_sets():
    inputs = head_inputs() | {"bias": torch.randn(VOCAB).bfloat16().requires_grad_(), "mask": torch.arange(ROWS) != 3}
    inputs["kept"] = torch.randint(-1, VOCAB, (ROWS, 20))  # some rows have fewer than 20 ids, or one twice
    inputs["kept"][:, 7] = inputs["labels"]

    def function(inputs, backend):
        return linear_token_stats(**inputs, stats=BOTH, backend=backend)[:2]

    hold(function, inputs)


def loss_inputs():
    sequences, length = 8, ROWS // 8
    logprobs = (torch.randn(sequences, length) * 0.3).requires_grad_()
    # Ratios are far from the clip range's limits, where rounding would decide a token's gradient.
    old = logprobs.detach() + torch.where(torch.rand(sequences, length) > 0.5, 0.5, 0.02)
    return {"logprobs": logprobs, "old": old, "advantages": torch.randn(sequences), "rewards": torch.rand(sequences)}


def test_policy_loss():
    def function(inputs, backend):
        return [policy_loss(inputs["logprobs"], inputs["old"], inputs["advantages"], backend=backend).loss]

    hold(function, loss_inputs(), floor=1e-5)


def test_grpo_loss():
    def function(inputs, backend):
        return [grpo_loss(inputs["logprobs"], inputs["old"], inputs["rewards"], 4, backend=backend).loss]

    hold(function, loss_inputs(), floor=1e-5)


def test_linear_policy_loss():
    inputs = head_inputs() | {"advantages": torch.randn(8)}
    wide = [inputs[name].detach().double() for name in ("hidden", "weight")]
    logprob = linear_token_stats(*wide, inputs["labels"], backend="reference").logprob.float().view(8, -1)
    inputs["old"] = logprob + torch.where(torch.rand_like(logprob) > 0.5, 0.5, 0.02)

    def function(inputs, backend):
        old, advantages = inputs["old"], inputs["advantages"]
        if backend == "plain":
            loss = policy_loss(head(inputs, "plain")[0].view_as(old), old, advantages, backend="reference").loss
        else:
            hidden, labels = inputs["hidden"].view(*old.shape, -1), inputs["labels"].view_as(old)
            loss = linear_policy_loss(hidden, inputs["weight"], labels, old, advantages, backend=backend).loss
        return [3 * loss]  # its gradient is not 1: the kernel runs that scales the gradients of the forward pass

    hold(function, inputs, plain="plain", floor=5e-3)  # one number, whose error in plain PyTorch may be small by chance


def test_group_advantages():
    hold(
        lambda inputs, backend: [group_advantages(inputs["rewards"], 4, backend=backend)],
        {"rewards": torch.rand(32)},
        floor=1e-5,
    )


def test_iqr_filter():
    entropy = torch.rand(64)
    got, want = (
        iqr_filter(entropy.to(device), 16, backend=backend)
        for device, backend in ((DEVICE, "triton"), ("cpu", "reference"))
    )
    assert got.keep.tolist() == want.keep.tolist()
    torch.testing.assert_close(got.lower.cpu(), want.lower)


def test_ema_update():
    def updated(device, backend):
        average, param = (torch.linspace(low, 1, 3001).to(device) for low in (-2, 0))
        ema_update_([average], [param.bfloat16()], 0.9, backend=backend)
        return average.cpu()

    torch.testing.assert_close(updated(DEVICE, "triton"), updated("cpu", "reference"), rtol=0, atol=0)
