"""The custom op of the fused head and policy loss, and the composition of the general ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels import backend as backends
from mgrpo_kernels import checks, sequences
from mgrpo_kernels.ops import _autograd, _statistics
from mgrpo_kernels.ops._schema import Schema
from mgrpo_kernels.ops.linear_policy_loss import native, reference, triton
from mgrpo_kernels.ops.linear_token_stats import kept_rows, linear_token_stats_op, take
from mgrpo_kernels.ops.linear_token_stats.specs import Head
from mgrpo_kernels.ops.policy_loss import OP as LOSS_OP
from mgrpo_kernels.ops.policy_loss import options, run
from mgrpo_kernels.ops.policy_loss.op import token_arguments
from mgrpo_kernels.ops.policy_loss.options import LossOptions
from mgrpo_kernels.ops.policy_loss.reference import token_weights
from mgrpo_kernels.ops.policy_loss.specs import LOSSES, METRICS, PolicyLoss, Tokens

OP = "linear_policy_loss"
backends.register(OP, reference=reference, native=native, triton=triton)

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
_NEED = {"need_hidden": "bool", "need_weight": "bool", "need_bias": "bool"}
ARGUMENTS = Schema(_HEAD | _TOKENS | options.SCHEMA | _NEED, "(Tensor, Tensor, Tensor, Tensor, Tensor)")
_RATIO_MAX, _SEQUENCES = METRICS.index("ratio_max"), METRICS.index("sequences")


def run_fused(head: dict[str, Any], tokens: Tokens, form: LossOptions, need: list[bool]) -> PolicyLoss:
    """Return the loss of checked inputs, whose gradients are formed in the forward pass."""
    of_tokens = token_arguments(tokens)
    arguments = head | {name: of_tokens[name] for name in _TOKENS} | options.to_arguments(form)
    loss, metrics, *_ = linear_policy_loss_op(*ARGUMENTS.pack(arguments | dict(zip(_NEED, need, strict=True))))
    return PolicyLoss(loss, dict(zip(METRICS, metrics.unbind(), strict=True)))


def run_composed(
    head: dict[str, Any], tokens: Tokens, form: LossOptions, tp_group: str | None, vocab_start: int
) -> PolicyLoss:
    """Return the loss of checked inputs by way of the general ops."""
    logprob, entropy, *_ = linear_token_stats_op(
        **head, mask=tokens.mask, tp_group=tp_group, vocab_start=vocab_start, debug=False
    )
    entropy = entropy if form.entropy_coef != 0 else entropy.detach()
    return run(tokens._replace(logprob=logprob, entropy=entropy), None, form, head["backend"])


@torch.library.custom_op("mgrpo_kernels::linear_policy_loss", mutates_args=(), schema=ARGUMENTS.text)
def linear_policy_loss_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, metrics ``(8,)``, and its gradients by hidden, weight and bias, in their dtypes; those not needed are empty."""
    given = ARGUMENTS.unpack(arguments)
    hidden, weight, labels, mask, backend = (given[name] for name in ("hidden", "weight", "labels", "mask", "backend"))
    checks.check_temperature_values(given["temperature_per_row"])
    sequences.check_offset_values("cu_seqlens", given["offsets"], hidden.shape[0])
    if labels.device.type == "cpu":
        checks.check_label_values(labels, mask, weight.shape[0])
    form = options.from_arguments(given)
    rows = kept_rows(mask)
    kept = take(hidden, rows)
    if rows is None and mask is not None:
        kept = torch.where(mask.unsqueeze(-1), hidden, 0.0)  # 0 x NaN would reach the weight's gradient
    tokens, number_of_sequences = _tokens_of(given, form, rows)
    loss = _BlockLoss(tokens, form, backend, weight.shape[0])
    per_row = given["temperature_per_row"]
    head = Head(
        weight=weight,
        bias=given["bias"],
        temperature=given["temperature"] if per_row is None else take(per_row, rows),
        logit_scale=given["logit_scale"],
        softcap=given["softcap"],
        vocab_start=0,
        workspace_bytes=given["workspace_bytes"],
    )
    need = tuple(given[name] for name in _NEED)
    grad_hidden, *others = backends.implementation(OP, backend).forward_backward(
        kept, head, take(labels, rows), loss.coefficients_of, need
    )
    loss.metrics[_SEQUENCES] = number_of_sequences.float()
    if grad_hidden is not None:
        grad_hidden = grad_hidden.to(hidden.dtype)
        if rows is not None:
            grad_hidden = torch.zeros_like(hidden).index_copy_(0, rows, grad_hidden)
    grads = [hidden.new_empty(0) if grad is None else grad.to(hidden.dtype) for grad in (grad_hidden, *others)]
    return loss.total, loss.metrics, *grads  # type: ignore[return-value]


def _tokens_of(given: dict[str, Any], form: LossOptions, rows: Tensor | None) -> tuple[Tokens, Tensor]:
    """Return the tokens of these rows with the whole batch's shares and counts, and the number of sequences (0-d)."""
    hidden, mask, offsets, advantages = (given[name] for name in ("hidden", "mask", "offsets", "advantages"))
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    counted = torch.ones_like(given["labels"], dtype=torch.bool) if mask is None else mask
    number_of_tokens = counted.sum().to(wide)
    number_of_sequences = number_of_tokens.new_full((), offsets.shape[0] - 1)
    if advantages.shape[0] != hidden.shape[0] or advantages.shape[0] == offsets.shape[0] - 1:
        advantages = advantages[sequences.group_index(offsets, hidden.shape[0])]
    normalizer, entropy_normalizer = given["normalizer"], given["entropy_normalizer"]
    if normalizer is None:
        loss = LOSSES[form.loss_type]
        normalizer = loss.normalizer(number_of_tokens, number_of_sequences, form.max_response_tokens)
    tokens = Tokens(
        logprob=hidden.new_empty(0, dtype=wide),
        old=take(given["old"], rows),
        advantages=take(advantages, rows),
        mask=mask if rows is None else None,
        offsets=offsets,
        ref=take(given["ref"], rows),
        entropy=None,
        behaviour=take(given["behaviour"], rows),
        normalizer=normalizer,
        entropy_normalizer=number_of_tokens if entropy_normalizer is None else entropy_normalizer,
        weights=take(token_weights(counted, offsets, form, wide), rows),
    )
    return tokens, number_of_sequences


class _BlockLoss:
    """The loss of blocks of rows, added up."""

    def __init__(self, tokens: Tokens, form: LossOptions, backend: str, vocab: int) -> None:
        self.tokens, self.form, self.vocab = tokens, form, vocab
        self.loss_of = backends.implementation(LOSS_OP, backend).forward
        self.total = tokens.logprob.new_zeros(())
        self.metrics = torch.zeros(len(METRICS), device=tokens.logprob.device)

    def coefficients_of(self, block: slice, statistics: _statistics.Statistics) -> Tensor:
        """Add the loss of a block; return what the gradient of its logits is made of."""
        part = _block(self.tokens, block)._replace(logprob=statistics.logprob, entropy=statistics.entropy)
        loss, seen, gradient, scales = self.loss_of(part, None, self.form)
        self.total = self.total + loss
        highest = torch.maximum(self.metrics[_RATIO_MAX], seen[_RATIO_MAX])
        self.metrics = self.metrics + seen
        self.metrics[_RATIO_MAX] = highest
        bonus = None if self.form.entropy_coef == 0 else torch.zeros_like(gradient) - scales[1]
        return _statistics.gradient_coefficients(
            gradient * scales[0], bonus, None, statistics.entropy, self.vocab, part.mask, statistics.logprob
        )


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
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = ARGUMENTS.unpack(arguments)
    hidden, weight = given["hidden"], given["weight"]
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(len(METRICS), dtype=torch.float32),
        hidden.new_empty(hidden.shape if given["need_hidden"] else (0,)),
        hidden.new_empty(weight.shape if given["need_weight"] else (0,)),
        hidden.new_empty(weight.shape[:1] if given["need_bias"] else (0,)),
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
    given = ARGUMENTS.unpack(inputs)
    _, metrics, *grads = output
    ctx.need = [given[name] for name in _NEED]
    ctx.backend = given["backend"]
    ctx.mark_non_differentiable(metrics, *grads)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    results: dict[str, Tensor | None] = {}
    if grad_loss is not None:
        grads = ctx.saved_tensors
        if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
            grads = linear_policy_loss_backward_op(grad_loss, *grads)
        else:  # nobody will ask again: what was saved can be what is returned
            backends.implementation(OP, ctx.backend).scale_(grads, grad_loss)
        for name, grad, need in zip(("hidden", "weight", "bias"), grads, ctx.need, strict=True):
            results[name] = grad if need else None
    return tuple([results.get(name) for name in ARGUMENTS.names])


linear_policy_loss_op.register_autograd(_backward, setup_context=_setup_context)
