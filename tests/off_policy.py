"""Batches of off-policy tokens, and the definitions of their weights in plain float64: what the tests of bounds and masks share."""

import torch

from mgrpo_kernels import policy_loss

LENGTHS = (9, 4, 0, 1, 9, 6, 7, 3)
B, L = len(LENGTHS), 9


def batch(seed=0, spread=0.3):
    """Return log-probs, old ones, those of the sampler and a mask with an empty sequence and a hole, and advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(B, L, generator=generator, dtype=torch.float64) * 3 - 0.02
    old, behaviour = (logprobs + spread * torch.randn(B, L, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(L) < torch.tensor(LENGTHS)[:, None]
    mask[0, 3] = False
    advantages = torch.randn(B, generator=generator, dtype=torch.float64)
    advantages[3] = 0.0
    return logprobs, old.clamp(max=-0.01), behaviour, mask, advantages


def sequence_mean(values, mask):
    return (torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)).unsqueeze(1)


def plain_weight(old, behaviour, mask, level, bound, floor, cap):
    """Return what the surrogate of each token is multiplied by, (B, L): the definition in words, one line each."""
    log = torch.where(mask, old - behaviour, 0.0)
    weight = {"token": log, "sequence": log.sum(1, keepdim=True), "geometric": sequence_mean(log, mask)}[level].exp()
    if bound == "truncate":
        return weight.clamp(floor, cap).expand_as(mask)
    return (weight * ((weight >= floor) & (weight <= cap))).expand_as(mask)


def plain_clip(logprobs, old, advantages, low=0.2, high=0.2):
    ratio, advantage = (logprobs - old).exp(), advantages.unsqueeze(1)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def mean_over_tokens(values, mask):
    return torch.where(mask, values, 0.0).sum() / mask.sum()


def ours(backend, logprobs, old, behaviour, mask, advantages, **options):
    """Return loss, gradient and metrics; what stands at masked positions must not be read."""
    leaf = logprobs.float().requires_grad_()
    hostile = [None if each is None else torch.where(mask, each.float(), torch.nan) for each in (old, behaviour)]
    loss, metrics = policy_loss(
        leaf, hostile[0], advantages.float(), mask=mask, behaviour_logprobs=hostile[1], backend=backend, **options
    )
    return loss.detach(), torch.autograd.grad(loss, leaf)[0], metrics


def assert_means(got, want, logprobs):
    """Hold loss and gradient to those of a float64 loss."""
    loss, gradient = got[:2]
    torch.testing.assert_close(loss.double(), want.detach(), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(want, logprobs)[0], rtol=2e-5, atol=1e-6)
