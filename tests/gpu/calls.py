"""One step, forward and backward, of every op: what the tests of promises run small, and ``make gpu-check ARGS=--profile`` at full size."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import mgrpo_kernels as mk

GROUP, SEQUENCES = 4, 8


class Sizes(NamedTuple):
    """Of a step."""

    rows: int  # a multiple of SEQUENCES
    width: int
    vocab: int
    tensors: int  # of the momentum update
    numel: int


class Call(NamedTuple):
    """A step of an op."""

    run: Callable[[], tuple[Tensor, ...]]  # outputs and gradients
    inputs: tuple[Tensor, ...]  # floating-point ones, which may be overwritten with other values


def _values(sizes: Sizes, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape or (SEQUENCES, sizes.rows // SEQUENCES), device=device)


def _labels(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randint(0, sizes.vocab, (sizes.rows,), device=device), torch.rand(sizes.rows, device=device) > 0.1


def token_stats(sizes: Sizes, device: torch.device) -> Call:
    logits, (labels, mask) = (
        _values(sizes, device, sizes.rows, sizes.vocab).bfloat16().requires_grad_(),
        _labels(sizes, device),
    )

    def run():
        stats = mk.token_stats_from_logits(logits, labels, mask=mask, temperature=0.9, backend="triton")
        return stats.logprob.detach(), *torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), logits)

    return Call(run, (logits,))


def _head(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    hidden = _values(sizes, device, sizes.rows, sizes.width).bfloat16().requires_grad_()
    weight = torch.empty(sizes.vocab, sizes.width, device=device).normal_(std=2.5 * sizes.width**-0.5)
    return hidden, weight.bfloat16().requires_grad_()


def linear_token_stats(sizes: Sizes, device: torch.device) -> Call:
    (hidden, weight), (labels, mask) = _head(sizes, device), _labels(sizes, device)

    def run():
        stats = mk.linear_token_stats(hidden, weight, labels, mask=mask, backend="triton")
        return stats.logprob.detach(), *torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), (hidden, weight))

    return Call(run, (hidden, weight))


def counted_token_stats(sizes: Sizes, device: torch.device) -> Call:
    """The caller gives the numbers of tokens: masked rows are left out, and half of the others in the backward pass."""
    (hidden, weight), (labels, mask) = _head(sizes, device), _labels(sizes, device)
    live = mask & (torch.arange(sizes.rows, device=device) % 2 == 0)
    counts = {"unmasked_tokens": int(mask.sum()), "tokens_with_gradient": int(live.sum())}

    def run():
        stats = mk.linear_token_stats(hidden, weight, labels, mask=mask, backend="triton", **counts)
        return stats.logprob.detach(), *torch.autograd.grad((stats.logprob * live).sum(), (hidden, weight))

    return Call(run, (hidden, weight))


def kept_token_stats(sizes: Sizes, device: torch.device) -> Call:
    (hidden, weight), (labels, mask) = _head(sizes, device), _labels(sizes, device)
    kept = torch.randint(-1, sizes.vocab, (sizes.rows, 64), device=device)
    kept[:, 0] = labels

    def run():
        stats = mk.linear_token_stats(hidden, weight, labels, mask=mask, kept=kept, backend="triton")
        return stats.logprob.detach(), *torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), (hidden, weight))

    return Call(run, (hidden, weight))


def sharp_head(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden, weight and labels in bfloat16 of rows that are sure of their token, before a tail that falls as a power of the rank."""
    weight, hidden = (
        _values(sizes, device, sizes.vocab, sizes.width),
        0.02 * _values(sizes, device, sizes.rows, sizes.width),
    )
    labels = torch.randint(0, min(1000, sizes.vocab), (sizes.rows,), device=device)
    weight[:, 0] = -(1.0 + torch.arange(sizes.vocab, device=device)).log()
    hidden[:, 0] = 4.0
    hidden[:, 1:] += 10.0 / sizes.width * weight[labels, 1:]
    return hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_(), labels


def sparse_token_stats(sizes: Sizes, device: torch.device) -> Call:
    """Gradients to a tolerance: the host waits once, for the numbers of rows and columns that are to be multiplied."""
    hidden, weight, labels = sharp_head(sizes, device)

    def run():
        stats = mk.linear_token_stats(hidden, weight, labels, gradient_tolerance=2.0**-8, backend="triton")
        return stats.logprob.detach(), *torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), (hidden, weight))

    return Call(run, (hidden, weight))


def linear_policy_loss(sizes: Sizes, device: torch.device) -> Call:
    (hidden, weight), (labels, mask) = _head(sizes, device), _labels(sizes, device)
    old, advantages = _values(sizes, device) - 6, _values(sizes, device, SEQUENCES)
    labels, mask = labels.view_as(old), mask.view_as(old)

    def run():
        result = mk.linear_policy_loss(
            hidden.view(*old.shape, -1), weight, labels, old, advantages, mask=mask, backend="triton"
        )
        return result.loss.detach(), *torch.autograd.grad(result.loss, (hidden, weight))

    return Call(run, (hidden, weight, old, advantages))


def counted_policy_loss(sizes: Sizes, device: torch.device) -> Call:
    """The caller gives the numbers of tokens: masked ones are left out, and for the gradient those of the sequences without an advantage."""
    (hidden, weight), (labels, mask) = _head(sizes, device), _labels(sizes, device)
    old, advantages = _values(sizes, device) - 6, _values(sizes, device, SEQUENCES)
    labels, mask = labels.view_as(old), mask.view_as(old)
    advantages[::2] = 0.0
    counts = {"unmasked_tokens": int(mask.sum()), "tokens_with_gradient": int(mask[1::2].sum())}

    def run():
        result = mk.linear_policy_loss(
            hidden.view(*old.shape, -1), weight, labels, old, advantages, mask=mask, backend="triton", **counts
        )
        return result.loss.detach(), *torch.autograd.grad(result.loss, (hidden, weight))

    return Call(run, (hidden, weight, old, advantages))


def policy_loss(sizes: Sizes, device: torch.device) -> Call:
    logprobs, old, ref = (_values(sizes, device) * 0.2 for _ in range(3))
    advantages, mask = _values(sizes, device, SEQUENCES), _values(sizes, device) < 1
    leaf = logprobs.requires_grad_()

    def run():
        result = mk.policy_loss(leaf, old, advantages, mask=mask, ref_logprobs=ref, kl_coef=0.01, backend="triton")
        return result.loss.detach(), *result.metrics.values(), *torch.autograd.grad(result.loss, leaf)

    return Call(run, (leaf, old, ref, advantages))


def grpo_loss(sizes: Sizes, device: torch.device) -> Call:
    logprobs, old = (_values(sizes, device) * 0.2 for _ in range(2))
    rewards, mask = _values(sizes, device, SEQUENCES), _values(sizes, device) < 1
    kept, leaf = _values(sizes, device, SEQUENCES) < 1.5, logprobs.requires_grad_()

    def run():
        result = mk.grpo_loss(
            leaf, old, rewards, GROUP, mask=mask, rollout_mask=kept, loss_type="dapo", backend="triton"
        )
        return result.loss.detach(), *torch.autograd.grad(result.loss, leaf)

    return Call(run, (leaf, old, rewards))


def group_advantages(sizes: Sizes, device: torch.device) -> Call:
    rewards, mask = _values(sizes, device, SEQUENCES * GROUP), _values(sizes, device, SEQUENCES * GROUP) < 1
    return Call(lambda: (mk.group_advantages(rewards, GROUP, mask=mask, backend="triton"),), (rewards,))


def iqr_filter(sizes: Sizes, device: torch.device) -> Call:
    entropy, mask = _values(sizes, device, SEQUENCES * 32), _values(sizes, device, SEQUENCES * 32) < 1
    return Call(lambda: tuple(mk.iqr_filter(entropy, 32, mask=mask, backend="triton")), (entropy,))


def ema(sizes: Sizes, device: torch.device) -> Call:
    params = [_values(sizes, device, sizes.numel).bfloat16() for _ in range(sizes.tensors)]
    before = [_values(sizes, device, sizes.numel) for _ in range(sizes.tensors)]
    average, emit = [each.clone() for each in before], [torch.empty_like(each) for each in params]

    def run():
        torch._foreach_copy_(average, before)
        mk.ema_update_(average, params, 0.99, emit=emit, backend="triton")
        return *average, *emit

    return Call(run, (*before, *params))


CALLS: dict[str, Callable[[Sizes, torch.device], Call]] = {
    make.__name__: make
    for make in (
        token_stats,
        linear_token_stats,
        counted_token_stats,
        kept_token_stats,
        linear_policy_loss,
        counted_policy_loss,
        policy_loss,
        grpo_loss,
        group_advantages,
        iqr_filter,
        ema,
    )
}
# The host waits for the device in these.
WAITING: dict[str, Callable[[Sizes, torch.device], Call]] = {"sparse_token_stats": sparse_token_stats}


def device_work(run: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """Return kernel (or copy, or memset) -> (how many times, microseconds) of one call, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    for _ in range(2):  # the profiler's own first start may lose what runs meanwhile
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
    work: dict[str, tuple[int, float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            number, time = work.get(event.name, (0, 0.0))
            work[event.name] = number + 1, time + event.time_range.elapsed_us()
    return dict(sorted(work.items(), key=lambda item: -item[1][1]))
