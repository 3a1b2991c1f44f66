"""From hidden states to the policy loss: head, token statistics and loss in one op, in a bounded workspace."""

from __future__ import annotations

import logging
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from mgrpo_kernels import backend as backends
from mgrpo_kernels import checks, sequences
from mgrpo_kernels.ops import _autograd, _statistics
from mgrpo_kernels.ops._head import (
    check_gradient_tolerance,
    check_head,
    check_head_options,
    check_kept,
    check_logits_dtype,
    check_rows,
    check_tp_group,
    flat_rows,
)
from mgrpo_kernels.ops._rows import check_counts, kept_rows, put_back, spoil, take, take_hidden
from mgrpo_kernels.ops._schema import Schema
from mgrpo_kernels.ops.kept_token_stats import kept_token_stats_op
from mgrpo_kernels.ops.linear_policy_loss import native, reference, triton
from mgrpo_kernels.ops.linear_policy_loss.blocks import BlockLoss, live_first, tokens_of
from mgrpo_kernels.ops.linear_token_stats.op import can_leave_out, linear_token_stats_op
from mgrpo_kernels.ops.linear_token_stats.specs import Head
from mgrpo_kernels.ops.policy_loss import check_tokens, flat_advantages, make_options, run, takes_options
from mgrpo_kernels.ops.policy_loss import options as loss_options
from mgrpo_kernels.ops.policy_loss.op import check_token_tensors, token_arguments
from mgrpo_kernels.ops.policy_loss.options import LossKeywords, LossOptions
from mgrpo_kernels.ops.policy_loss.specs import METRICS, PolicyLoss, Tokens, is_token_level

OP = "linear_policy_loss"
backends.register(OP, reference=reference, native=native, triton=triton)

_logged: set[str] = set()


@takes_options
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
    kept: Tensor | None = None,
    gradient_tolerance: float | None = None,
    workspace_bytes: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    mask: Tensor | None = None,
    unmasked_tokens: int | None = None,
    tokens_with_gradient: int | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    behaviour_logprobs: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    backend: str | None = None,
    **options: Unpack[LossKeywords],
) -> PolicyLoss:
    """Return :func:`policy_loss` of the log-probs that :func:`linear_token_stats` would give, both fused.

    Where a token's gradient depends on that token alone (every loss but vespo and gmpo; importance and behaviour weights per token; no
    mask of sequences) and the hardware gains by it, the gradient is formed in the forward pass, while a block of rows has its logits at
    hand: 3 matmuls instead of 4, for the memory of a float32 sum of a 16-bit weight's gradient. Else the two ops are composed, as with
    `kept`, where three products of N K H instead of four would save little. Which, and why, is logged once; both agree to rounding.

    Args:
        hidden: padded ``(B, L, H)``, or packed ``(N, H)`` with `cu_seqlens`.
        weight: ``(V, H)``.
        labels: ``(B, L)`` or ``(N,)`` int32 or int64, already shifted.
        old_logprobs: of labels' shape, or None: on-policy.
        advantages: ``(B,)`` or of labels' shape.
        bias, temperature, logit_scale, softcap, kept, logits_dtype, tp_group, vocab_start: as in :func:`linear_token_stats`.
        gradient_tolerance: as in :func:`linear_token_stats`. Where the backend leaves entries out the two ops are composed, because the
            backward pass then takes a small part of a matmul.
        workspace_bytes: bound of the logits workspace, whatever the number of tokens, at least 64 KiB, and at least one row's logits where
            the gradient is formed in the forward pass. None: 224 MiB (native), 512 MiB (triton) or 64 MiB
            (reference).
        mask, cu_seqlens, ref_logprobs, behaviour_logprobs: as in :func:`policy_loss`. The entropy of the bonus and of the
            metrics is the head's own.
        unmasked_tokens: as in :func:`linear_token_stats`.
        tokens_with_gradient: as in :func:`linear_token_stats`: unmasked tokens whose advantage is not 0, or all unmasked ones with a KL
            penalty or an entropy bonus. A loss that weighs whole sequences gives every token of such a sequence a gradient.
        {options}
        normalizer, entropy_normalizer, backend: as in :func:`policy_loss`.

    Returns:
        PolicyLoss. Gradients reach hidden, weight and bias.

    Raises:
        TypeError, ValueError, BackendUnavailable: as the two ops do.
    """
    form = make_options("linear_policy_loss", options)
    hidden, weight, bias = check_head(hidden, weight, bias)
    rows = hidden.shape[:-1]
    checks.check_tensor("labels", labels, dtypes=checks.INTS, shape=rows, device=hidden.device)
    wide = _statistics.statistics_dtype(hidden)
    like = torch.empty((), dtype=wide, device=hidden.device).expand(rows)  # of the log-probs to come
    tokens = check_tokens(
        logprobs=like,
        old_logprobs=old_logprobs,
        mask=mask,
        cu_seqlens=cu_seqlens,
        ref_logprobs=ref_logprobs,
        entropy=like,
        behaviour_logprobs=behaviour_logprobs,
        normalizer=normalizer,
        entropy_normalizer=entropy_normalizer,
        options=form,
        name="labels",
    )
    flat = flat_rows(hidden)
    check_counts(mask, flat.shape[0], unmasked_tokens, tokens_with_gradient)
    tokens = tokens._replace(advantages=flat_advantages(advantages, like, tokens), entropy=None)
    check_head_options(logit_scale, softcap, workspace_bytes)
    check_logits_dtype(logits_dtype, hidden.dtype)
    check_gradient_tolerance(gradient_tolerance)
    number, per_row = checks.check_temperature(temperature, rows, hidden.device)
    group_name, vocab_start = check_tp_group(tp_group, vocab_start, weight)
    name = backends.choose(OP, backend, hidden.device, hidden.dtype)

    need = [torch.is_grad_enabled() and each is not None and each.requires_grad for each in (hidden, weight, bias)]
    fused, why = backends.implementation(OP, name).fusion(hidden.device, hidden.dtype)
    if fused and not is_token_level(form, behaviour_logprobs):
        fused, why = False, "this loss weighs whole sequences"
    kept = check_kept(kept, rows, hidden.device)
    if fused and kept is not None:
        fused, why = False, "a softmax over kept sets has few matmuls to save"
    if fused and group_name is not None:
        fused, why = False, "the statistics of a sharded vocabulary need the group"
    if fused and gradient_tolerance is not None and can_leave_out(name):
        fused, why = False, "entries without a share of the gradient are left out of the backward pass"
    if not torch.compiler.is_compiling() and any(need):
        _log(fused, why)
    head = {
        "hidden": flat,
        "weight": weight,
        "bias": bias,
        "labels": labels.reshape(-1),
        "temperature_per_row": None if per_row is None else per_row.reshape(-1),
        "temperature": number,
        "logit_scale": float(logit_scale),
        "softcap": softcap,
        "workspace_bytes": workspace_bytes,
        "logits_dtype": logits_dtype,
        "unmasked_tokens": unmasked_tokens,
        "tokens_with_gradient": tokens_with_gradient,
        "backend": name,
    }
    if fused and any(need):
        return _run_fused(head, tokens, form, need)
    return _run_composed(head, tokens, form, group_name, vocab_start, kept, gradient_tolerance, gradient=any(need))


def _log(fused: bool, why: str) -> None:
    if why not in _logged:
        _logged.add(why)
        how = "forms the gradient in the forward pass" if fused else "composes the general ops"
        logging.getLogger("mgrpo_kernels").info("%s %s: %s", OP, how, why)


_HEAD = {
    "hidden": "Tensor",  # (T, H)
    "weight": "Tensor",  # (V, H)
    "bias": "Tensor?",  # (V,)
    "labels": "Tensor",  # (T,)
    "temperature_per_row": "Tensor?",  # (T,)
    "temperature": "float",
    "logit_scale": "float",
    "softcap": "float?",
    "workspace_bytes": "SymInt?",
    "logits_dtype": "ScalarType",
    "unmasked_tokens": "SymInt?",
    "tokens_with_gradient": "SymInt?",
    "backend": "str",
}
_TOKENS = {
    "old": "Tensor?",  # (T,)
    "advantages": "Tensor",  # (T,) or (B,)
    "mask": "Tensor?",  # (T,)
    "offsets": "Tensor",  # (B+1,)
    "ref": "Tensor?",  # (T,)
    "behaviour": "Tensor?",  # (T,)
    "normalizer": "Tensor?",  # 0-d
    "entropy_normalizer": "Tensor?",  # 0-d
}
COUNTS = ("unmasked_tokens", "tokens_with_gradient")
_NEED = {"need_hidden": "bool", "need_weight": "bool", "need_bias": "bool"}
_ANCHOR = {"anchor": "Tensor?"}  # of hidden, weight and bias, which the backward pass does not read
ARGUMENTS = Schema(_HEAD | _TOKENS | loss_options.SCHEMA | _NEED | _ANCHOR, "(Tensor, Tensor, Tensor, Tensor, Tensor)")
_SEQUENCES = METRICS.index("sequences")


def _run_fused(head: dict[str, Any], tokens: Tokens, form: LossOptions, need: list[bool]) -> PolicyLoss:
    """Return the loss of checked inputs, whose gradients are formed in the forward pass."""
    of_tokens = token_arguments(tokens)
    arguments = head | {name: of_tokens[name] for name in _TOKENS} | loss_options.to_arguments(form)
    arguments |= dict(zip(_NEED, need, strict=True))
    arguments["anchor"] = _autograd.anchor(head["hidden"], head["weight"], head["bias"])
    loss, metrics, *_ = linear_policy_loss_op(*ARGUMENTS.pack(arguments))
    return PolicyLoss(loss, dict(zip(METRICS, metrics.unbind(), strict=True)))


def _run_composed(
    head: dict[str, Any],
    tokens: Tokens,
    form: LossOptions,
    tp_group: str | None,
    vocab_start: int,
    kept: Tensor | None,
    gradient_tolerance: float | None,
    *,
    gradient: bool,
) -> PolicyLoss:
    """Return the loss of checked inputs by way of the general ops."""
    given = head | {"mask": tokens.mask, "tp_group": tp_group, "vocab_start": vocab_start, "debug": False}
    if kept is None:
        statistics = linear_token_stats_op(
            **given,
            want_entropy=True,  # the metrics show it
            want_self_certainty=False,
            store_logits=gradient,
            gradient_tolerance=gradient_tolerance if gradient else None,
        )
    else:
        given = {name: value for name, value in given.items() if name not in COUNTS}
        statistics = kept_token_stats_op(**given, kept=kept)
    logprob, entropy, *_ = statistics
    entropy = entropy if form.entropy_coef != 0 else entropy.detach()
    return run(tokens._replace(logprob=logprob, entropy=entropy), None, form, head["backend"])


@torch.library.custom_op("mgrpo_kernels::linear_policy_loss", mutates_args=(), schema=ARGUMENTS.text)
def linear_policy_loss_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, metrics ``(9,)``, and its gradients by hidden, weight and bias, in their dtypes; those not needed are empty."""
    given = ARGUMENTS.unpack(arguments)
    hidden, weight, labels, mask, backend = (given[name] for name in ("hidden", "weight", "labels", "mask", "backend"))
    _autograd.refuse_tangents("linear_policy_loss", hidden, weight, given["bias"])
    check_rows(hidden, weight, given["bias"], labels, mask, given["temperature_per_row"])
    check_token_tensors(given, hidden.shape[0], hidden.device)
    check_counts(mask, hidden.shape[0], given["unmasked_tokens"], given["tokens_with_gradient"])
    checks.check_temperature_values(given["temperature_per_row"])
    sequences.check_offset_values("cu_seqlens", given["offsets"], hidden.shape[0])
    if labels.device.type == "cpu":
        checks.check_label_values(labels, mask, weight.shape[0])
    form, _ = loss_options.from_arguments(given)
    kept = kept_rows(mask, hidden.shape[0], given["unmasked_tokens"])
    rows, live, too_low = live_first(kept, given, form)
    tokens, number_of_sequences = tokens_of(given, form, rows)
    loss = BlockLoss(tokens, form, backend, weight.shape[0], (kept.wrong, too_low))
    per_row = given["temperature_per_row"]
    head = Head(
        weight=weight,
        bias=given["bias"],
        temperature=given["temperature"] if per_row is None else take(per_row, rows),
        logit_scale=given["logit_scale"],
        softcap=given["softcap"],
        vocab_start=0,
        workspace_bytes=given["workspace_bytes"],
        logits_dtype=given["logits_dtype"],
    )
    need = tuple(given[name] for name in _NEED)
    grad_hidden, *others = backends.implementation(OP, backend).forward_backward(
        take_hidden(hidden, rows, mask, kept),
        head,
        take(labels, rows),
        loss.coefficients_of,
        need,
        live,
        loss.gradients,
    )
    loss.metrics[_SEQUENCES] = number_of_sequences.float()
    if grad_hidden is not None:
        grad_hidden = spoil(put_back(grad_hidden.to(hidden.dtype), rows, hidden.shape[0]), *loss.wrong)
    grads = [hidden.new_empty(0) if grad is None else grad.to(hidden.dtype) for grad in (grad_hidden, *others)]
    return spoil(loss.total, *loss.wrong), spoil(loss.metrics, *loss.wrong), *grads


@linear_policy_loss_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = ARGUMENTS.unpack(arguments)
    hidden, weight = given["hidden"], given["weight"]
    wide = _statistics.statistics_dtype(hidden)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(len(METRICS), dtype=torch.float32),
        hidden.new_empty(hidden.shape if given["need_hidden"] else (0,)),
        hidden.new_empty(weight.shape if given["need_weight"] else (0,)),
        hidden.new_empty(weight.shape[:1] if given["need_bias"] else (0,)),
    )


@torch.library.custom_op("mgrpo_kernels::linear_policy_loss_backward", mutates_args=())
def linear_policy_loss_backward_op(
    grad_loss: Tensor, grad_hidden: Tensor, grad_weight: Tensor, grad_bias: Tensor, anchor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the forward pass times that of the loss. `anchor` makes them depend on the inputs."""
    for name, grad in (("grad_hidden", grad_hidden), ("grad_weight", grad_weight), ("grad_bias", grad_bias)):
        checks.check_tensor(name, grad)
    checks.check_tensor("grad_loss", grad_loss, shape=(), device=grad_hidden.device)
    hidden, weight, bias = (grad * grad_loss.to(grad.dtype) for grad in (grad_hidden, grad_weight, grad_bias))
    return hidden, weight, bias


@linear_policy_loss_backward_op.register_fake
def _(grad_loss: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(grad) for grad in grads[:3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = ARGUMENTS.unpack(inputs)
    _, metrics, *grads = output
    ctx.need = [given[name] for name in _NEED]
    ctx.backend = given["backend"]
    ctx.mark_non_differentiable(metrics, *grads)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads, given["anchor"])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    results: dict[str, Tensor | None] = {}
    if grad_loss is not None:
        *grads, anchor = ctx.saved_tensors
        if torch.is_grad_enabled() and anchor is None:
            raise RuntimeError(f"mgrpo_kernels::{OP}: expected an anchor with create_graph=True, got None")
        if _autograd.asked_again(grad_loss):
            grads = linear_policy_loss_backward_op(grad_loss, *grads, anchor)
        else:  # what was saved can be what is returned
            backends.implementation(OP, ctx.backend).scale_(grads, grad_loss)
        for name, grad, need in zip(("hidden", "weight", "bias"), grads, ctx.need, strict=True):
            results[name] = grad if need else None
    return tuple([results.get(name) for name in ARGUMENTS.names])


_autograd.register(linear_policy_loss_op, linear_policy_loss_backward_op, _backward, _setup_context)
