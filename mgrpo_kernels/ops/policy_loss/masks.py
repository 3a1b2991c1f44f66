"""Which tokens of a batch have a policy loss: choices that compare a token with all others. Plain torch functions, not ops.

They are made for ``policy_loss``: a mask multiplies the advantages of tokens, so that the tokens left out keep their places in
the normalizer and their KL penalty. With micro-batches or several ranks, call them for the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels import checks


@torch.no_grad()
def top_entropy_mask(entropy: Tensor, share: float, *, mask: Tensor | None = None) -> Tensor:
    """Return the tokens whose entropy is among the highest of the batch (arXiv 2506.01939), as TRL's top_entropy_quantile does.

    Args:
        entropy: of each token, of any shape.
        share: of the unmasked tokens, in (0, 1]. The tokens are those at or above the quantile 1 - share, interpolated linearly.
        mask: bool of entropy's shape, True counts.

    Returns:
        Bool of entropy's shape; False where masked. NaN counts as the highest entropy.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or range.
    """
    checks.check_tensor("entropy", entropy)
    checks.check_number("share", share, above=0.0, at_most=1.0)
    counted = _counted(mask, entropy)
    wide = entropy.double()
    values = wide[counted].sort().values
    if values.numel() == 0:
        return counted
    place = (1.0 - share) * (values.numel() - 1)
    below = int(place)
    threshold = torch.lerp(values[below], values[min(below + 1, values.numel() - 1)], place - below)
    return counted & ((wide >= threshold) | wide.isnan())


@torch.no_grad()
def clip_cov_mask(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    share: float = 0.0002,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the tokens that keep their policy loss under Clip-Cov (arXiv 2505.22617), as verl's loss "clip_cov" chooses them.

    A random choice of tokens whose covariance, the product of the deviations of advantage and log-prob from their means, is between
    the bounds has none.

    Args:
        logprobs, old_logprobs: ``(B, L)``, or packed ``(N,)``.
        advantages: of each token, of the log-probs' shape.
        mask: bool of the log-probs' shape, True counts.
        share: of the unmasked tokens, in (0, 1]: how many tokens are chosen, rounded down, but at least one.
        cov_low, cov_high: bounds of the covariance, both exclusive.
        clip_low, clip_high: those of the loss; a token that the clip leaves without a gradient is not chosen.
        generator: of the random choice, on the CPU; None: torch's own.

    Returns:
        Bool of the log-probs' shape, False where masked.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or range.
    """
    counted = _checked(logprobs, advantages, mask, share)
    checks.check_tensor("old_logprobs", old_logprobs, shape=logprobs.shape, device=logprobs.device)
    if cov_low > cov_high:
        raise ValueError(f"cov_low: expected at most cov_high {cov_high}, got {cov_low}")
    ratio = torch.where(counted, logprobs - old_logprobs, 0.0).exp()
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high) > -advantages * ratio
    covariance = _covariance(logprobs, advantages, counted)
    eligible = (counted & ~clipped & (covariance > cov_low) & (covariance < cov_high)).reshape(-1).nonzero().squeeze(-1)
    number = max(1, int(share * int(counted.sum())))
    chosen = eligible[torch.randperm(eligible.numel(), generator=generator)[:number].to(eligible.device)]
    keep = counted.clone()
    keep.view(-1)[chosen] = False
    return keep


def kl_cov_penalty(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    share: float = 0.0002,
    coef: float = 1.0,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return the penalty of KL-Cov (arXiv 2505.22617), which is added to a loss without clipping, as in verl's loss "kl_cov".

    It is coef |logprob - old| of the tokens with the largest covariance, which :func:`clip_cov_mask` defines, divided by `normalizer`. The
    loss without clipping is ``policy_loss(..., loss_type="dapo", clip_low=1.0, clip_high=1e30)``.

    Args:
        logprobs, old_logprobs, advantages, mask: as in :func:`clip_cov_mask`. The penalty has a gradient by `logprobs`.
        share: of the unmasked tokens, in (0, 1]: how many tokens have the penalty, rounded down, but at least one.
        coef: of the penalty.
        normalizer: count of the whole batch, a number or 0-d tensor; None: the unmasked tokens of this call.

    Returns:
        0-d.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or range.
    """
    counted = _checked(logprobs, advantages, mask, share)
    checks.check_tensor("old_logprobs", old_logprobs, shape=logprobs.shape, device=logprobs.device)
    places = counted.reshape(-1).nonzero().squeeze(-1)
    covariance = _covariance(logprobs.detach(), advantages, counted).reshape(-1)[places]
    number = min(places.numel(), max(1, int(share * places.numel())))
    chosen = places[covariance.topk(number).indices]
    gap = logprobs.reshape(-1)[chosen] - old_logprobs.reshape(-1)[chosen]
    divisor = max(1, places.numel()) if normalizer is None else normalizer
    return coef * gap.abs().sum() / divisor


def _checked(logprobs: Tensor, advantages: Tensor, mask: Tensor | None, share: float) -> Tensor:
    """Check what the covariance is computed from; return which tokens count."""
    checks.check_tensor("logprobs", logprobs)
    checks.check_tensor("advantages", advantages, shape=logprobs.shape, device=logprobs.device)
    checks.check_number("share", share, above=0.0, at_most=1.0)
    return _counted(mask, logprobs)


def _counted(mask: Tensor | None, like: Tensor) -> Tensor:
    mask = checks.check_mask("mask", mask, like.shape, like.device)
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask


def _covariance(logprobs: Tensor, advantages: Tensor, counted: Tensor) -> Tensor:
    """Return the product of each token's deviations from the means over the tokens that count; 0 elsewhere."""
    number = counted.sum().clamp(min=1)

    def deviation(values: Tensor) -> Tensor:
        kept = torch.where(counted, values, 0.0)
        return kept - kept.sum() / number

    return torch.where(counted, deviation(logprobs) * deviation(advantages), 0.0)
