"""Group advantages and policy losses: clipped surrogates and their relatives, KL penalty, entropy bonus, importance weights.

What they are is declared in two files: the options in ``options.py``, the loss types in ``loss_types.py``.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from mgrpo_kernels import backend as backends
from mgrpo_kernels import checks
from mgrpo_kernels.ops.policy_loss.inputs import check_groups, check_tokens, flat_advantages
from mgrpo_kernels.ops.policy_loss.op import OP, group_advantages_op, pack, policy_loss_op, run
from mgrpo_kernels.ops.policy_loss.options import LossKeywords, check_options, make_options, takes_options
from mgrpo_kernels.ops.policy_loss.specs import PolicyLoss

__all__ = [
    "OP",
    "check_options",
    "check_tokens",
    "flat_advantages",
    "group_advantages",
    "grpo_loss",
    "make_options",
    "pack",
    "policy_loss",
    "policy_loss_op",
    "run",
    "takes_options",
]


def group_advantages(
    rewards: Tensor,
    groups: int | Tensor,
    *,
    mask: Tensor | None = None,
    baseline: str = "mean",
    scale: str = "std",
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Return each rollout's advantage over its group (GRPO, arXiv 2402.03300): (reward - baseline) / (scale + eps).

    Args:
        rewards: ``(B,)`` floating point. A NaN in a kept rollout makes its whole group NaN (with scale "batch": every group).
        groups: group size G, or int offsets ``(P+1,)`` of contiguous groups.
        mask: ``(B,)`` bool; a dropped rollout counts for nothing and gets 0, whatever its reward holds.
        baseline: "mean" of the group, or "leave_one_out" (RLOO, arXiv 2402.14740): the mean of the others.
        scale: "std" of the group (unbiased), "batch": std over all kept rollouts (REINFORCE++, arXiv 2501.03262), "none" (Dr. GRPO,
            arXiv 2503.20783), or "mean": absolute value of the group's mean reward (MaxRL, arXiv 2602.02710), for rewards >= 0.
        eps: >= 0, added to the scale.
        backend: ``reference``, ``native`` or ``triton``; None picks.

    Returns:
        ``(B,)``, float32 (float64 for float64), without gradient. A group with fewer than two kept rollouts, or with equal
        rewards, gets exactly 0.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, device, option, or groups that do not fit.
        BackendUnavailable: `backend` cannot run here.
    """
    checked = check_groups(rewards, groups, mask, "mask", baseline, scale, eps)
    name = backends.choose(OP, backend, rewards.device, rewards.dtype)
    advantages: Tensor = group_advantages_op(
        checked.rewards, checked.offsets, checked.mask, checked.baseline, checked.scale, checked.eps, name
    )
    return advantages


@takes_options
def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    behaviour_logprobs: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    backend: str | None = None,
    **options: Unpack[LossKeywords],
) -> PolicyLoss:
    r"""Return the loss of a policy on sampled tokens, and its metrics.

    loss = sum_t share_t (b_t surrogate_t + kl_coef kl_t) / normalizer - entropy_coef sum_t entropy_t / entropy_normalizer

    with the importance ratio r = exp(logprob - old), or the exponential of its mean over the sequence, and the behaviour
    weight b = exp(old - behaviour). `loss_type` selects the surrogate (A is the advantage), a token's share, and what the
    normalizer counts:

        {loss_types}

    The meanings are those of TRL 1.16's ``GRPOTrainer._compute_loss`` and ``GMPOTrainer``, and of verl 0.9 for dppo. exp() is never
    taken of a masked position.

    Args:
        logprobs: padded ``(B, L)``, or packed ``(N,)`` with `cu_seqlens`. Computed in float32 (float64 for float64).
        old_logprobs: of the same shape, without gradient; None means on-policy: the log-probs themselves.
        advantages: ``(B,)`` or of the log-probs' shape.
        mask: bool of the log-probs' shape, True counts. The values of a masked position are never read, in any input.
        cu_seqlens: int32 or int64 ``(B+1,)``, ascending from 0 to N.
        ref_logprobs: of the reference policy. Needed with kl_coef > 0; otherwise the KL divergence is only measured.
        entropy: per token. Needed with entropy_coef != 0, and then gets a gradient; otherwise it is only measured.
        behaviour_logprobs: log-probs that the sampler reported. They weight each token by b, detached and bounded by
            `behaviour_mode`, `behaviour_floor` and `behaviour_cap`.
        {options}
        normalizer: count (number or 0-d tensor) of the whole batch, for micro-batches and ranks; None: of this call.
        entropy_normalizer: likewise, in tokens.
        backend: ``reference``, ``native`` or ``triton``; None picks the fastest that can run.

    Returns:
        PolicyLoss. Metrics: tokens, sequences, kl_sum, entropy_sum, ratio_sum, ratio_max, clip_low_count, clip_high_count,
        masked_count, over unmasked tokens (clip counts as TRL: outside the range on the side where the clip binds; masked_count:
        tokens whose surrogate is set to 0 by a behaviour_mode that masks or by a mask of sequences).

    Raises:
        TypeError: wrong type or dtype, or an unknown keyword.
        ValueError: wrong shape, device, range or option, or an input that an option needs and that is missing.
        BackendUnavailable: `backend` cannot run here.
    """
    form = make_options("policy_loss", options)
    tokens = check_tokens(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        mask=mask,
        cu_seqlens=cu_seqlens,
        ref_logprobs=ref_logprobs,
        entropy=entropy,
        behaviour_logprobs=behaviour_logprobs,
        normalizer=normalizer,
        entropy_normalizer=entropy_normalizer,
        options=form,
    )
    tokens = tokens._replace(advantages=flat_advantages(advantages, logprobs, tokens))
    return run(tokens, None, form, backends.choose(OP, backend, logprobs.device, logprobs.dtype))


@takes_options
def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    rewards: Tensor,
    groups: int | Tensor,
    *,
    rollout_mask: Tensor | None = None,
    baseline: str = "mean",
    scale: str = "std",
    eps: float = 1e-6,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    behaviour_logprobs: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    backend: str | None = None,
    **options: Unpack[LossKeywords],
) -> PolicyLoss:
    """Return :func:`policy_loss` with :func:`group_advantages` of `rewards`, fused.

    Args:
        logprobs: as in :func:`policy_loss`, one sequence per rollout.
        old_logprobs: likewise.
        rewards: ``(B,)``.
        groups: group size, or int offsets ``(P+1,)``.
        rollout_mask: ``(B,)`` bool; False takes a rollout out of everything: advantage, loss, KL, entropy and every count.
        baseline, scale, eps: as in :func:`group_advantages`.
        mask, cu_seqlens, ref_logprobs, entropy, behaviour_logprobs: as in :func:`policy_loss`.
        {options}
        normalizer, entropy_normalizer, backend: as in :func:`policy_loss`.

    Returns:
        PolicyLoss.

    Raises:
        TypeError, ValueError, BackendUnavailable: as the two functions do.
    """
    form = make_options("grpo_loss", options)
    tokens = check_tokens(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        mask=mask,
        cu_seqlens=cu_seqlens,
        ref_logprobs=ref_logprobs,
        entropy=entropy,
        behaviour_logprobs=behaviour_logprobs,
        normalizer=normalizer,
        entropy_normalizer=entropy_normalizer,
        options=form,
    )
    checked = check_groups(rewards, groups, rollout_mask, "rollout_mask", baseline, scale, eps)
    number = tokens.offsets.shape[0] - 1
    if rewards.shape[0] != number or rewards.device != logprobs.device:
        raise ValueError(
            f"rewards: expected shape ({number},) on {logprobs.device}, one for each sequence, "
            f"got {checks.shape_text(rewards.shape)} on {rewards.device}"
        )
    return run(tokens, checked, form, backends.choose(OP, backend, logprobs.device, logprobs.dtype))
