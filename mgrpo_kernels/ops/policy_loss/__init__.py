"""Group advantages and policy losses: clipped surrogates and their relatives, KL penalty, entropy bonus, importance weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels import backend as backends
from mgrpo_kernels import checks, sequences
from mgrpo_kernels.ops import _autograd
from mgrpo_kernels.ops.policy_loss import native, reference, triton
from mgrpo_kernels.ops.policy_loss.specs import (
    BASELINES,
    METRICS,
    SCALES,
    Groups,
    LossOptions,
    PolicyLoss,
    Tokens,
    check_options,
)

OP = "policy_loss"
backends.register(OP, reference=reference, native=native, triton=triton)

_DEFAULTS = LossOptions()


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
        scale: "std" of the group (unbiased), "batch": std over all kept rollouts (REINFORCE++, arXiv 2501.03262), or "none" (Dr. GRPO,
            arXiv 2503.20783).
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
    checked = _check_groups(rewards, groups, mask, "mask", baseline, scale, eps)
    name = backends.choose(OP, backend, rewards.device, rewards.dtype)
    return group_advantages_op(
        checked.rewards, checked.offsets, checked.mask, checked.baseline, checked.scale, checked.eps, name
    )


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
    loss_type: str = _DEFAULTS.loss_type,
    importance_level: str = _DEFAULTS.importance_level,
    clip_low: float = _DEFAULTS.clip_low,
    clip_high: float = _DEFAULTS.clip_high,
    clip_delta: float | None = _DEFAULTS.clip_delta,
    kl_coef: float = _DEFAULTS.kl_coef,
    kl_estimator: str = _DEFAULTS.kl_estimator,
    kl_bias_correction: bool = _DEFAULTS.kl_bias_correction,
    entropy_coef: float = _DEFAULTS.entropy_coef,
    behaviour_mode: str = _DEFAULTS.behaviour_mode,
    behaviour_cap: float = _DEFAULTS.behaviour_cap,
    cispo_cap: float = _DEFAULTS.cispo_cap,
    sapo_temperature: tuple[float, float] = _DEFAULTS.sapo_temperature,
    vespo_k: tuple[float, float] = _DEFAULTS.vespo_k,
    vespo_lambda: tuple[float, float] = _DEFAULTS.vespo_lambda,
    max_response_tokens: int | None = None,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    r"""Return the loss of a policy on sampled tokens, and its metrics.

    loss = sum_t share_t (b_t surrogate_t + kl_coef kl_t) / normalizer - entropy_coef sum_t entropy_t / entropy_normalizer

    with ratio r = exp(logprob - old) ("sequence": the exponential of its mean over the sequence, GSPO, arXiv 2507.18071), and by
    `loss_type` the surrogate (A the advantage), a token's share, and what the normalizer counts:

        ========  =======================================================  ================  ================================
        grpo      -min(min(r, delta) A, clip(r, 1 - low, 1 + high) A)      1 / its length    sequences
        bnpo      the same                                                 1                 tokens
        dapo      the same                                                 1                 tokens
        dr_grpo   the same                                                 1                 sequences x max_response_tokens
        luspo     the same                                                 1                 sequences
        cispo     -min(r, cispo_cap) A logprob, the weight held constant   1                 tokens
        sapo      -4 sigmoid(tau (r - 1)) / tau A                          1 / its length    sequences
        vespo     -gamma(w) A logprob, w the sequence's weight             1                 tokens
        ========  =======================================================  ================  ================================

    Sources: grpo arXiv 2402.03300, dapo 2503.14476, dr_grpo 2503.20783, luspo 2602.05261, cispo 2506.13585, sapo 2511.20347, vespo
    2602.10693; clip_delta 2505.07291; kl_bias_correction 2512.02556; k1, k2, k3: J. Schulman, "Approximating KL Divergence".
    The meanings are those of TRL 1.16's ``GRPOTrainer._compute_loss``. exp() never sees a masked position.

    Args:
        logprobs: padded ``(B, L)``, or packed ``(N,)`` with `cu_seqlens`. Float32 inside, whatever the dtype (float64 stays).
        old_logprobs: of the same shape, detached by nature; None: on-policy, the log-probs themselves.
        advantages: ``(B,)`` or of the log-probs' shape.
        mask: bool of the log-probs' shape, True counts. What a masked position holds, in any input, is never read.
        cu_seqlens: int32 or int64 ``(B+1,)``, ascending from 0 to N.
        ref_logprobs: of the reference policy; needed with kl_coef > 0, else only measured.
        entropy: per token; needed with entropy_coef != 0, else only measured. Gets the bonus's gradient.
        behaviour_logprobs: what the sampler said; weights each token by b = exp(old - behaviour), detached, by `behaviour_mode`.
        loss_type, importance_level: see above.
        clip_low, clip_high: half-widths of the clip range. clip_delta: upper bound of the unclipped ratio (two-sided clip), or None.
        kl_coef, kl_estimator: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1, d = ref - logprob. kl_bias_correction: times r.
        entropy_coef: of the entropy bonus.
        behaviour_mode: truncate the weight at `behaviour_cap` or zero it beyond; of a token or of the product over its sequence.
        cispo_cap, sapo_temperature, vespo_k, vespo_lambda: of those losses; pairs are (advantage >= 0, < 0), sapo's (> 0, <= 0).
        max_response_tokens: needed by dr_grpo unless `normalizer` is given.
        normalizer: count (number or 0-d tensor) of the whole batch, for micro-batches and ranks; None: of this call.
        entropy_normalizer: likewise, in tokens.
        backend: ``reference``, ``native`` or ``triton``; None picks.

    Returns:
        PolicyLoss. Metrics: tokens, sequences, kl_sum, entropy_sum, ratio_sum, ratio_max, clip_low_count, clip_high_count, over
        unmasked tokens (clip counts as TRL: outside the range on the side where the clip binds).

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, device, range or option, or an input that an option needs and that is missing.
        BackendUnavailable: `backend` cannot run here.
    """
    options = check_options(LossOptions(
        loss_type, importance_level, clip_low, clip_high, clip_delta, kl_coef, kl_estimator, kl_bias_correction, entropy_coef,
        behaviour_mode, behaviour_cap, cispo_cap, sapo_temperature, vespo_k, vespo_lambda, max_response_tokens,
    ))  # fmt: skip
    tokens = check_tokens(
        logprobs,
        old_logprobs,
        mask,
        cu_seqlens,
        ref_logprobs,
        entropy,
        behaviour_logprobs,
        normalizer,
        entropy_normalizer,
        options,
    )
    return _run(tokens._replace(advantages=flat_advantages(advantages, logprobs, tokens)), None, options, backend)


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
    loss_type: str = _DEFAULTS.loss_type,
    importance_level: str = _DEFAULTS.importance_level,
    clip_low: float = _DEFAULTS.clip_low,
    clip_high: float = _DEFAULTS.clip_high,
    clip_delta: float | None = _DEFAULTS.clip_delta,
    kl_coef: float = _DEFAULTS.kl_coef,
    kl_estimator: str = _DEFAULTS.kl_estimator,
    kl_bias_correction: bool = _DEFAULTS.kl_bias_correction,
    entropy_coef: float = _DEFAULTS.entropy_coef,
    behaviour_mode: str = _DEFAULTS.behaviour_mode,
    behaviour_cap: float = _DEFAULTS.behaviour_cap,
    cispo_cap: float = _DEFAULTS.cispo_cap,
    sapo_temperature: tuple[float, float] = _DEFAULTS.sapo_temperature,
    vespo_k: tuple[float, float] = _DEFAULTS.vespo_k,
    vespo_lambda: tuple[float, float] = _DEFAULTS.vespo_lambda,
    max_response_tokens: int | None = None,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """Return :func:`policy_loss` with :func:`group_advantages` of `rewards`, fused.

    Args:
        logprobs: as in :func:`policy_loss`, one sequence a rollout.
        old_logprobs: likewise.
        rewards: ``(B,)``.
        groups: group size, or int offsets ``(P+1,)``.
        rollout_mask: ``(B,)`` bool; False takes a rollout out of everything: advantage, loss, KL, entropy and every count.
        baseline, scale, eps: as in :func:`group_advantages`.
        mask, cu_seqlens, ref_logprobs, entropy, behaviour_logprobs: as in :func:`policy_loss`, and so is every option below them.

    Returns:
        PolicyLoss.

    Raises:
        TypeError, ValueError, BackendUnavailable: as the two functions do.
    """
    options = check_options(LossOptions(
        loss_type, importance_level, clip_low, clip_high, clip_delta, kl_coef, kl_estimator, kl_bias_correction, entropy_coef,
        behaviour_mode, behaviour_cap, cispo_cap, sapo_temperature, vespo_k, vespo_lambda, max_response_tokens,
    ))  # fmt: skip
    tokens = check_tokens(
        logprobs,
        old_logprobs,
        mask,
        cu_seqlens,
        ref_logprobs,
        entropy,
        behaviour_logprobs,
        normalizer,
        entropy_normalizer,
        options,
    )
    checked = _check_groups(rewards, groups, rollout_mask, "rollout_mask", baseline, scale, eps)
    number = tokens.offsets.shape[0] - 1
    if rewards.shape[0] != number or rewards.device != logprobs.device:
        raise ValueError(
            f"rewards: want shape ({number},) on {logprobs.device}, one for each sequence, "
            f"got {checks.shape_text(rewards.shape)} on {rewards.device}"
        )
    return _run(tokens, checked, options, backend)


def check_tokens(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    behaviour_logprobs: Tensor | None,
    normalizer: float | Tensor | None,
    entropy_normalizer: float | Tensor | None,
    options: LossOptions,
    *,
    name: str = "logprobs",
) -> Tokens:
    """Check per-token inputs against each other and return them flat, advantages still missing. `name` is what errors call `logprobs`."""
    checks.check_tensor(name, logprobs)
    offsets = sequences.sequence_offsets(name, logprobs, cu_seqlens)
    rows = logprobs.shape
    mask = checks.check_mask("mask", mask, rows, logprobs.device)
    for argument, values in (
        ("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs), ("entropy", entropy), ("behaviour_logprobs", behaviour_logprobs),
    ):  # fmt: skip
        if values is not None:
            checks.check_tensor(argument, values, shape=rows, device=logprobs.device)
    if options.kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: want a tensor with kl_coef {options.kl_coef}, got None")
    if options.entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy: want a tensor with entropy_coef {options.entropy_coef}, got None")
    if options.loss_type == "dr_grpo" and options.max_response_tokens is None and normalizer is None:
        raise ValueError("max_response_tokens: want an int with loss_type 'dr_grpo' and no normalizer, got None")
    if (
        options.loss_type == "vespo"
        and behaviour_logprobs is not None
        and options.behaviour_mode.startswith("sequence")
    ):
        raise ValueError(
            f"behaviour_mode: want token_truncate or token_mask with loss_type 'vespo', got {options.behaviour_mode!r}"
        )

    def flat(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.reshape(-1)

    return Tokens(
        logprobs.reshape(-1), flat(old_logprobs), None, flat(mask), offsets, flat(ref_logprobs), flat(entropy),
        flat(behaviour_logprobs), _count("normalizer", normalizer, logprobs), _count("entropy_normalizer", entropy_normalizer, logprobs),
    )  # fmt: skip


def _count(name: str, value: float | Tensor | None, like: Tensor) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        checks.check_tensor(name, value, dtypes=checks.FLOATS + checks.INTS, dim=0, device=like.device)
        if value.requires_grad:
            raise ValueError(f"{name}: want a tensor without requires_grad, got one that requires grad")
        return value.to(statistics_dtype(like))
    checks.check_number(name, value, above=0.0)
    return torch.full((), value, dtype=statistics_dtype(like), device=like.device)


def statistics_dtype(values: Tensor) -> torch.dtype:
    """Losses are computed in float32, and in float64 only for float64."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def flat_advantages(advantages: Tensor, logprobs: Tensor, tokens: Tokens) -> Tensor:
    """Return advantages flat, ``(B,)`` or ``(T,)``."""
    checks.check_tensor("advantages", advantages, device=logprobs.device)
    number = tokens.offsets.shape[0] - 1
    if advantages.shape not in (logprobs.shape, (number,)):
        raise ValueError(
            f"advantages: want shape ({number},) or {checks.shape_text(logprobs.shape)}, got {checks.shape_text(advantages.shape)}"
        )
    return advantages.reshape(-1)


def _check_groups(
    rewards: Tensor, groups: int | Tensor, mask: Tensor | None, mask_name: str, baseline: str, scale: str, eps: float
) -> Groups:
    checks.check_tensor("rewards", rewards, dim=1)
    checks.check_choice("baseline", baseline, BASELINES)
    checks.check_choice("scale", scale, SCALES)
    checks.check_number("eps", eps, at_least=0.0)
    mask = checks.check_mask(mask_name, mask, rewards.shape, rewards.device)
    offsets = sequences.group_offsets(groups, rewards.shape[0], rewards.device)
    return Groups(rewards.detach().to(statistics_dtype(rewards)), offsets, mask, baseline, scale, float(eps))


def _run(tokens: Tokens, groups: Groups | None, options: LossOptions, backend: str | None) -> PolicyLoss:
    name = backends.choose(OP, backend, tokens.logprob.device, tokens.logprob.dtype)
    loss, metrics, _, _ = policy_loss_op(*pack(tokens, groups, options), name)
    return PolicyLoss(loss, dict(zip(METRICS, metrics.unbind(), strict=True)))


def pack(tokens: Tokens, groups: Groups | None, options: LossOptions) -> tuple[Any, ...]:
    """Return the three records as the custom op's arguments: tensors, then numbers, then names."""
    rewards, group_offsets, rollout_mask, baseline, scale, eps = groups or (
        None,
        None,
        None,
        BASELINES[0],
        SCALES[0],
        0.0,
    )
    delta = float("inf") if options.clip_delta is None else options.clip_delta
    numbers = [
        eps, options.clip_low, options.clip_high, delta, options.kl_coef, options.entropy_coef, options.behaviour_cap, options.cispo_cap,
        *options.sapo_temperature, *options.vespo_k, *options.vespo_lambda, options.max_response_tokens or 0,
    ]  # fmt: skip
    names = ",".join(
        (baseline, scale, options.loss_type, options.importance_level, options.kl_estimator, options.behaviour_mode)
    )
    return (
        *tokens[:-1],
        rewards,
        group_offsets,
        rollout_mask,
        [float(n) for n in numbers],
        names,
        options.kl_bias_correction,
    )


def unpack(
    tensors: tuple[Tensor | None, ...], numbers: list[float], names: str, kl_bias_correction: bool
) -> tuple[Tokens, Groups | None, LossOptions]:
    """Return what :func:`pack` was given."""
    baseline, scale, loss_type, level, estimator, mode = names.split(",")
    eps, low, high, delta, kl, bonus, cap, cispo_cap, *pairs, length = numbers
    *token_tensors, rewards, group_offsets, rollout_mask = tensors
    groups = None
    if rewards is not None:
        assert group_offsets is not None
        groups = Groups(rewards, group_offsets, rollout_mask, baseline, scale, eps)
    options = LossOptions(
        loss_type, level, low, high, None if delta == float("inf") else delta, kl, estimator, kl_bias_correction, bonus, mode, cap,
        cispo_cap, (pairs[0], pairs[1]), (pairs[2], pairs[3]), (pairs[4], pairs[5]), int(length) or None,
    )  # fmt: skip
    return Tokens(*token_tensors), groups, options  # type: ignore[arg-type]


@torch.library.custom_op("mgrpo_kernels::group_advantages", mutates_args=())
def group_advantages_op(
    rewards: Tensor,  # (B,) float32 or float64
    offsets: Tensor,  # (P+1,) int64
    mask: Tensor | None,  # (B,)
    baseline: str,
    scale: str,
    eps: float,
    backend: str,
) -> Tensor:
    """Return the advantages ``(B,)``."""
    sequences.check_offset_values("groups", offsets, rewards.shape[0])
    groups = Groups(rewards, offsets, mask, baseline, scale, eps)
    return backends.implementation(OP, backend).group_advantages(groups)


@group_advantages_op.register_fake
def _(rewards: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(rewards)


@torch.library.custom_op("mgrpo_kernels::policy_loss", mutates_args=())
def policy_loss_op(
    logprob: Tensor,  # (T,)
    old: Tensor | None,  # (T,)
    advantages: Tensor | None,  # (T,) or (B,)
    mask: Tensor | None,  # (T,)
    offsets: Tensor,  # (B+1,) int64
    ref: Tensor | None,  # (T,)
    entropy: Tensor | None,  # (T,)
    behaviour: Tensor | None,  # (T,)
    normalizer: Tensor | None,  # 0-d
    entropy_normalizer: Tensor | None,  # 0-d
    rewards: Tensor | None,  # (B,)
    group_offsets: Tensor | None,  # (P+1,)
    rollout_mask: Tensor | None,  # (B,)
    numbers: list[float],
    names: str,
    kl_bias_correction: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, metrics ``(8,)``, d loss / d logprob before the normalizer ``(T,)``, and the two factors to apply ``(2,)``."""
    tensors = (
        logprob, old, advantages, mask, offsets, ref, entropy, behaviour, normalizer, entropy_normalizer,
        rewards, group_offsets, rollout_mask,
    )  # fmt: skip
    tokens, groups, options = unpack(tensors, numbers, names, kl_bias_correction)
    sequences.check_offset_values("cu_seqlens", offsets, logprob.shape[0])
    if groups is not None:
        sequences.check_offset_values("groups", groups.offsets, groups.rewards.shape[0])
    return backends.implementation(OP, backend).forward(tokens, groups, options)


@policy_loss_op.register_fake
def _(logprob: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(logprob)
    return (
        logprob.new_empty((), dtype=dtype),
        logprob.new_empty(len(METRICS), dtype=torch.float32),
        torch.empty_like(logprob, dtype=dtype),
        logprob.new_empty(2, dtype=dtype),
    )


@torch.library.custom_op("mgrpo_kernels::policy_loss_backward", mutates_args=())
def policy_loss_backward_op(
    grad_loss: Tensor,  # 0-d
    gradient: Tensor,  # (T,) before the normalizer
    scales: Tensor,  # (2,)
    mask: Tensor | None,  # (T,)
    offsets: Tensor,  # (B+1,)
    rollout_mask: Tensor | None,  # (B,)
    dtype: torch.dtype,
    entropy_dtype: torch.dtype,
    need_logprob: bool,
    need_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of logprob and entropy ``(T,)``; those not needed are empty. Elementwise: no backends."""
    grad_logprob, grad_entropy = gradient.new_empty(0, dtype=dtype), gradient.new_empty(0, dtype=entropy_dtype)
    if need_logprob:
        factor = grad_loss * scales[0]
        grad_logprob = gradient * factor
        # A masked token gets 0 whatever the factor. On a CPU it costs nothing to see that it is finite.
        if factor.device.type != "cpu" or not factor.isfinite():
            grad_logprob = torch.where(gradient == 0, 0.0, grad_logprob)
        grad_logprob = grad_logprob.to(dtype)
    if need_entropy:
        counted = torch.ones_like(gradient, dtype=torch.bool) if mask is None else mask
        if rollout_mask is not None:
            counted = counted & rollout_mask[sequences.group_index(offsets, counted.shape[0])]
        grad_entropy = torch.where(counted, -grad_loss * scales[1], 0.0).to(entropy_dtype)
    return grad_logprob, grad_entropy


@policy_loss_backward_op.register_fake
def _(
    grad_loss: Tensor, gradient: Tensor, scales: Any, mask: Any, offsets: Any, rollout_mask: Any, dtype: torch.dtype,
    entropy_dtype: torch.dtype, need_logprob: bool, need_entropy: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        gradient.new_empty(gradient.shape if need_logprob else (0,), dtype=dtype),
        gradient.new_empty(gradient.shape if need_entropy else (0,), dtype=entropy_dtype),
    )


_autograd.forbid_second_derivative(policy_loss_backward_op)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logprob, mask, offsets, entropy, rollout_mask = (inputs[i] for i in (0, 3, 4, 6, 12))
    _, metrics, gradient, scales = output
    ctx.mark_non_differentiable(metrics, gradient, scales)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient, scales, mask, offsets, rollout_mask)
    ctx.dtypes = logprob.dtype, logprob.dtype if entropy is None else entropy.dtype


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    need_logprob, need_entropy = ctx.needs_input_grad[0], ctx.needs_input_grad[6]
    results: list[Tensor | None] = [None] * 17
    if grad_loss is not None:
        grads = policy_loss_backward_op(grad_loss, *ctx.saved_tensors, *ctx.dtypes, need_logprob, need_entropy)
        results[0] = grads[0] if need_logprob else None
        results[6] = grads[1] if need_entropy else None
    return tuple(results)


policy_loss_op.register_autograd(_backward, setup_context=_setup_context)
