"""The loss on the native backend without the dispatcher, whose way to a custom op of many arguments takes longer than a small batch.

Only where nothing but this call sees the difference: plain tensors, outside of torch.compile, transforms and dispatch modes. Elsewhere, and
on other backends, the custom op of op.py runs. Both have one formula of the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels.ops import _autograd
from mgrpo_kernels.ops.policy_loss import native
from mgrpo_kernels.ops.policy_loss.gradients import gradients
from mgrpo_kernels.ops.policy_loss.specs import Groups, LossOptions, Tokens

_PLAIN = (Tensor, torch.nn.Parameter, type(None))


def applies(tokens: Tokens, groups: Groups | None) -> bool:
    """Return whether nothing is there that has to see a custom op."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and all(type(each) in _PLAIN for each in tokens)
        and (groups is None or all(type(each) in _PLAIN for each in groups[:3]))
    )


def forward(tokens: Tokens, groups: Groups | None, form: LossOptions) -> tuple[Tensor, Tensor]:
    """Return loss (0-d), with a graph where one is needed, and metrics ``(9,)``, of checked inputs."""
    _autograd.refuse_tangents("policy_loss", tokens.logprob, tokens.entropy)
    wants_graph = tokens.logprob.requires_grad or (tokens.entropy is not None and tokens.entropy.requires_grad)
    if wants_graph and torch.is_grad_enabled():
        loss, metrics = _Loss.apply(tokens.logprob, tokens.entropy, tokens, groups, form)  # type: ignore[no-untyped-call]
    else:
        loss, metrics, *_ = native.forward(tokens, groups, form)
    return loss, metrics


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logprob: Tensor, entropy: Tensor | None, tokens: Tokens, groups: Groups | None, form: LossOptions
    ) -> tuple[Tensor, Tensor]:
        loss, metrics, gradient, scales = native.forward(tokens, groups, form)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        rollout_mask = None if groups is None else groups.mask
        ctx.save_for_backward(gradient, scales, logprob, entropy, tokens.mask, tokens.offsets, rollout_mask)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        need_logprob, need_entropy = ctx.needs_input_grad[:2]
        of_logprob, of_entropy = gradients(grad_loss, ctx.saved_tensors, need_logprob, need_entropy)
        return of_logprob, of_entropy, None, None, None
