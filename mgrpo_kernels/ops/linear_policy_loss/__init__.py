"""From hidden states to the policy loss: head, token statistics and loss in one op, in a bounded workspace."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mgrpo_kernels import backend as backends
from mgrpo_kernels import checks, sequences
from mgrpo_kernels.ops import _autograd, _statistics
from mgrpo_kernels.ops.linear_policy_loss import native, reference, triton
from mgrpo_kernels.ops.linear_token_stats import check_head, check_head_options, kept_rows, linear_token_stats, take
from mgrpo_kernels.ops.linear_token_stats.specs import Head
from mgrpo_kernels.ops.policy_loss import OP as LOSS_OP
from mgrpo_kernels.ops.policy_loss import check_tokens, flat_advantages, pack, policy_loss, unpack
from mgrpo_kernels.ops.policy_loss.reference import own_normalizer, token_weights
from mgrpo_kernels.ops.policy_loss.specs import METRICS, LossOptions, PolicyLoss, Tokens, check_options, is_token_level

OP = "linear_policy_loss"
backends.register(OP, reference=reference, native=native, triton=triton)

_DEFAULTS = LossOptions()
_logged: set[str] = set()


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace_bytes: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
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
    """Return :func:`policy_loss` of the log-probs that :func:`linear_token_stats` would give, both fused.

    Where a token's gradient depends on that token alone (every loss but vespo, importance and behaviour weights per token) and the
    hardware gains by it, the gradient is formed in the forward pass, while a block of rows has its logits at hand: 3 matmuls
    instead of 4, for one float32 accumulator of the weight's gradient. Else the two ops are composed. Which, and why, is logged
    once; both agree to rounding.

    Args:
        hidden: padded ``(B, L, H)``, or packed ``(N, H)`` with `cu_seqlens`.
        weight: ``(V, H)``.
        labels: ``(B, L)`` or ``(N,)`` int32 or int64, already shifted.
        old_logprobs: of labels' shape, or None: on-policy.
        advantages: ``(B,)`` or of labels' shape.
        bias, temperature, logit_scale, softcap, tp_group, vocab_start: as in :func:`linear_token_stats`.
        workspace_bytes: bound of the logits workspace, whatever the number of tokens, at least 64 KiB, and at least one row's logits where
            the gradient is formed in the forward pass. None: there 224 MiB (native) or 512 MiB (triton), elsewhere the default of
            :func:`linear_token_stats`.
        mask, cu_seqlens, ref_logprobs, behaviour_logprobs: as in :func:`policy_loss`, and so is every option below them. The entropy
            of the bonus and of the metrics is the head's own.

    Returns:
        PolicyLoss. Gradients reach hidden, weight and bias.

    Raises:
        TypeError, ValueError, BackendUnavailable: as the two ops do.
    """
    options = check_options(LossOptions(
        loss_type, importance_level, clip_low, clip_high, clip_delta, kl_coef, kl_estimator, kl_bias_correction, entropy_coef,
        behaviour_mode, behaviour_cap, cispo_cap, sapo_temperature, vespo_k, vespo_lambda, max_response_tokens,
    ))  # fmt: skip
    hidden, weight, bias = check_head(hidden, weight, bias)
    rows = hidden.shape[:-1]
    checks.check_tensor("labels", labels, dtypes=checks.INTS, shape=rows, device=hidden.device)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    like = torch.empty((), dtype=wide, device=hidden.device).expand(rows)  # stands for the log-probs to come
    tokens = check_tokens(
        like, old_logprobs, mask, cu_seqlens, ref_logprobs, like, behaviour_logprobs, normalizer, entropy_normalizer, options,
        name="labels",
    )  # fmt: skip
    tokens = tokens._replace(advantages=flat_advantages(advantages, like, tokens), entropy=None)
    name = backends.choose(OP, backend, hidden.device, hidden.dtype)

    need = tuple(torch.is_grad_enabled() and each is not None and each.requires_grad for each in (hidden, weight, bias))
    fused, why = backends.implementation(OP, name).fusion(hidden.device, hidden.dtype)
    if fused and not is_token_level(options, behaviour_logprobs):
        fused, why = False, "this loss weighs whole sequences"
    if fused and tp_group is not None:
        fused, why = False, "the statistics of a sharded vocabulary need the group"
    if not torch.compiler.is_compiling() and any(need):
        _log(fused, why)
    if not (fused and any(need)):
        stats = linear_token_stats(
            hidden, weight, labels, bias=bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap, mask=mask,
            tp_group=tp_group, vocab_start=vocab_start, workspace_bytes=workspace_bytes, backend=name,
        )  # fmt: skip
        assert stats.logprob is not None
        assert stats.entropy is not None
        return policy_loss(
            stats.logprob, old_logprobs, advantages, mask=mask, cu_seqlens=cu_seqlens, ref_logprobs=ref_logprobs,
            entropy=stats.entropy if entropy_coef != 0 else stats.entropy.detach(), behaviour_logprobs=behaviour_logprobs,
            **options._asdict(), normalizer=normalizer, entropy_normalizer=entropy_normalizer, backend=name,
        )  # fmt: skip

    check_head_options(logit_scale, softcap, workspace_bytes)
    if vocab_start not in (None, 0):
        raise ValueError(f"vocab_start: want None or 0 without a tp_group, got {vocab_start}")
    number, per_row = checks.check_temperature(temperature, rows, hidden.device)
    packed = pack(tokens, None, options)
    loss, metrics, *_ = linear_policy_loss_op(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1), None if per_row is None else per_row.reshape(-1),
        number, float(logit_scale), softcap, workspace_bytes, *packed[1:6], *packed[7:10], *packed[13:], *need, name,
    )  # fmt: skip
    return PolicyLoss(loss, dict(zip(METRICS, metrics.unbind(), strict=True)))


def _log(fused: bool, why: str) -> None:
    if why not in _logged:
        _logged.add(why)
        how = "forms the gradient in the forward pass" if fused else "composes the general ops"
        logging.getLogger("mgrpo_kernels").info("%s %s: %s", OP, how, why)


@torch.library.custom_op("mgrpo_kernels::linear_policy_loss", mutates_args=())
def linear_policy_loss_op(
    hidden: Tensor,  # (T, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (T,)
    temperature_per_row: Tensor | None,  # (T,)
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    workspace_bytes: int | None,
    old: Tensor | None,  # (T,)
    advantages: Tensor,  # (T,) or (B,)
    mask: Tensor | None,  # (T,)
    offsets: Tensor,  # (B+1,)
    ref: Tensor | None,  # (T,)
    behaviour: Tensor | None,  # (T,)
    normalizer: Tensor | None,  # 0-d
    entropy_normalizer: Tensor | None,  # 0-d
    numbers: list[float],
    names: str,
    kl_bias_correction: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, metrics ``(8,)``, and its gradients by hidden, weight and bias, in their dtypes; those not needed are empty."""
    checks.check_temperature_values(temperature_per_row)
    sequences.check_offset_values("cu_seqlens", offsets, hidden.shape[0])
    if labels.device.type == "cpu":
        checks.check_label_values(labels, mask, weight.shape[0])
    _, _, options = unpack((*[None] * 13,), numbers, names, kl_bias_correction)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    counted = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    number_of_tokens = counted.sum().to(wide)
    number_of_sequences = number_of_tokens.new_full((), offsets.shape[0] - 1)
    sequence = sequences.group_index(offsets, hidden.shape[0])
    if advantages.shape[0] != labels.shape[0] or advantages.shape[0] == offsets.shape[0] - 1:
        advantages = advantages[sequence]
    rows = kept_rows(mask)
    kept = take(hidden, rows)
    if rows is None and mask is not None:
        kept = torch.where(mask.unsqueeze(-1), hidden, 0.0)  # 0 x NaN would reach the weight's gradient
    tokens = Tokens(
        logprob=kept.new_empty(0, dtype=wide),
        old=take(old, rows),
        advantages=take(advantages, rows),
        mask=mask if rows is None else None,
        offsets=offsets,
        ref=take(ref, rows),
        entropy=None,
        behaviour=take(behaviour, rows),
        normalizer=own_normalizer(number_of_tokens, number_of_sequences, options) if normalizer is None else normalizer,
        entropy_normalizer=number_of_tokens if entropy_normalizer is None else entropy_normalizer,
        weights=take(token_weights(counted, offsets, options, wide), rows),
    )
    labels = take(labels, rows)
    total, metrics = number_of_tokens.new_zeros(()), torch.zeros(len(METRICS), device=hidden.device)
    loss_of = backends.implementation(LOSS_OP, backend).forward

    def coefficients_of(block: slice, statistics: _statistics.Statistics) -> Tensor:
        nonlocal total, metrics
        part = _block(tokens, block)._replace(logprob=statistics.logprob, entropy=statistics.entropy)
        loss, seen, gradient, scales = loss_of(part, None, options)
        total = total + loss
        highest = torch.maximum(metrics[RATIO_MAX], seen[RATIO_MAX])
        metrics = metrics + seen
        metrics[RATIO_MAX] = highest
        bonus = None if options.entropy_coef == 0 else torch.zeros_like(gradient) - scales[1]
        return _statistics.gradient_coefficients(
            gradient * scales[0], bonus, None, statistics.entropy, weight.shape[0], part.mask, statistics.logprob
        )

    head = Head(
        weight, bias, temperature if temperature_per_row is None else take(temperature_per_row, rows), logit_scale, softcap, 0,
        workspace_bytes,
    )  # fmt: skip
    grad_hidden, grad_weight, grad_bias = backends.implementation(OP, backend).forward_backward(
        kept, head, labels, coefficients_of, (need_hidden, need_weight, need_bias)
    )
    metrics[METRICS.index("sequences")] = number_of_sequences.float()
    if grad_hidden is not None:
        grad_hidden = grad_hidden.to(hidden.dtype)
        if rows is not None:
            grad_hidden = torch.zeros_like(hidden).index_copy_(0, rows, grad_hidden)
    grads = tuple(
        hidden.new_empty(0) if grad is None else grad.to(hidden.dtype) for grad in (grad_hidden, grad_weight, grad_bias)
    )
    return total, metrics, *grads  # type: ignore[return-value]


RATIO_MAX = METRICS.index("ratio_max")


def _block(tokens: Tokens, block: slice) -> Tokens:
    """Return some rows of per-token tensors. Each is a sequence of its own: what sequences share is in `weights` by now."""
    number = block.stop - block.start

    def cut(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[block]

    return tokens._replace(
        old=cut(tokens.old), advantages=cut(tokens.advantages), mask=cut(tokens.mask), ref=cut(tokens.ref),
        behaviour=cut(tokens.behaviour), weights=cut(tokens.weights),
        offsets=torch.arange(number + 1, device=tokens.offsets.device),
    )  # fmt: skip


@linear_policy_loss_op.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias, _ = rest[-4:]
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(len(METRICS), dtype=torch.float32),
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        hidden.new_empty(weight.shape if need_weight else (0,)),
        hidden.new_empty(weight.shape[:1] if need_bias else (0,)),
    )


@torch.library.custom_op("mgrpo_kernels::linear_policy_loss_backward", mutates_args=())
def linear_policy_loss_backward_op(
    grad_loss: Tensor, grad_hidden: Tensor, grad_weight: Tensor, grad_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the forward pass times that of the loss."""
    hidden, weight, bias = (grad * grad_loss.to(grad.dtype) for grad in (grad_hidden, grad_weight, grad_bias))
    return hidden, weight, bias


@linear_policy_loss_backward_op.register_fake
def _(grad_loss: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(grad) for grad in grads)


_autograd.forbid_second_derivative(linear_policy_loss_backward_op)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, metrics, *grads = output
    *_, need_hidden, need_weight, need_bias, ctx.backend = inputs
    ctx.need = (need_hidden, need_weight, need_bias)
    ctx.mark_non_differentiable(metrics, *grads)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (*[None] * 24,)
    grads = ctx.saved_tensors
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        grads = linear_policy_loss_backward_op(grad_loss, *grads)
    else:  # nobody will ask again: what was saved can be what is returned
        backends.implementation(OP, ctx.backend).scale_(grads, grad_loss)
    return (*(grad if need else None for grad, need in zip(grads, ctx.need, strict=True)), *[None] * 21)


linear_policy_loss_op.register_autograd(_backward, setup_context=_setup_context)
