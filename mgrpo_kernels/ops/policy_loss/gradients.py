"""The backward pass of the policy loss: it scales the gradient that the forward pass has left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels import checks, sequences
from mgrpo_kernels.ops import _autograd


@torch.library.custom_op("mgrpo_kernels::policy_loss_backward", mutates_args=())
def policy_loss_backward_op(
    grad_loss: Tensor,  # 0-d
    gradient: Tensor,  # (T,) before the normalizer
    scales: Tensor,  # (2,)
    logprob: Tensor,  # (T,), for its dtype, and so that the result is known to depend on it
    entropy: Tensor | None,  # (T,), likewise
    mask: Tensor | None,  # (T,)
    offsets: Tensor,  # (B+1,)
    rollout_mask: Tensor | None,  # (B,)
    need_logprob: bool,
    need_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of logprob and entropy ``(T,)``; those not needed are empty. Elementwise: no backends."""
    checks.check_tensor("gradient", gradient, dtypes=checks.WIDE_FLOATS, dim=1)
    for name, required in (("logprob", logprob), ("grad_loss", grad_loss), ("scales", scales)):
        checks.check_tensor(name, required)  # not None, which the dispatcher lets pass
    sequences.check_offset_tensor("offsets", offsets, gradient.shape[0], gradient.device)
    checks.check_inside(
        gradient.device,
        ("grad_loss", grad_loss, (), checks.FLOATS),
        ("scales", scales, (2,), checks.WIDE_FLOATS),
        ("logprob", logprob, gradient.shape, checks.FLOATS),
        ("entropy", entropy, gradient.shape, checks.FLOATS),
        ("mask", mask, gradient.shape, checks.BOOL),
        ("rollout_mask", rollout_mask, (offsets.shape[0] - 1,), checks.BOOL),
    )
    dtype, entropy_dtype = logprob.dtype, (logprob if entropy is None else entropy).dtype
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
    grad_loss: Tensor, gradient: Tensor, scales: Tensor, logprob: Tensor, entropy: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    *_, need_logprob, need_entropy = rest
    return (
        gradient.new_empty(gradient.shape if need_logprob else (0,), dtype=logprob.dtype),
        gradient.new_empty(
            gradient.shape if need_entropy else (0,), dtype=(logprob if entropy is None else entropy).dtype
        ),
    )


def gradients(
    grad_loss: Tensor | None, saved: Sequence[Tensor], need_logprob: bool, need_entropy: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of logprob and entropy ``(T,)``, None where not needed, from what the backward op takes after `grad_loss`."""
    if grad_loss is None:
        return None, None
    gradient, scales, logprob, *others = saved
    if not need_entropy and _scale_in_place(gradient, scales, grad_loss):
        return gradient.to(logprob.dtype), None
    of_logprob, of_entropy = policy_loss_backward_op(
        grad_loss, gradient, scales, logprob, *others, need_logprob, need_entropy
    )
    return of_logprob if need_logprob else None, of_entropy if need_entropy else None


def _scale_in_place(gradient: Tensor, scales: Tensor, grad_loss: Tensor) -> bool:
    """Turn the saved gradient into the one to return if nothing reads it again and its zeros stay zeros; else return False.

    On a CPU, where the first write to each page of a second tensor takes longer than the product.
    """
    if (
        type(gradient) is not Tensor  # FakeTensor, for example, which has no values
        or gradient.device.type != "cpu"
        or torch._C._len_torch_dispatch_stack() > 0  # a mode that sees operators is to see this one
        or _autograd.asked_again(grad_loss)
    ):
        return False
    factor = grad_loss * scales[0]
    if not math.isfinite(factor.item()):
        return False
    gradient.mul_(factor)
    return True
