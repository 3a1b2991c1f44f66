"""From hidden states to the policy loss: head, token statistics and loss in one op, in a bounded workspace."""

from __future__ import annotations

import logging
from typing import Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from mgrpo_kernels import backend as backends
from mgrpo_kernels import checks
from mgrpo_kernels.ops.linear_policy_loss.op import OP, linear_policy_loss_op, run_composed, run_fused
from mgrpo_kernels.ops.linear_token_stats import check_head, check_head_options, check_tp_group
from mgrpo_kernels.ops.policy_loss import check_tokens, flat_advantages, make_options, takes_options
from mgrpo_kernels.ops.policy_loss.options import LossKeywords
from mgrpo_kernels.ops.policy_loss.specs import PolicyLoss, is_token_level

__all__ = ["OP", "linear_policy_loss", "linear_policy_loss_op"]

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
    workspace_bytes: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    behaviour_logprobs: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    backend: str | None = None,
    **options: Unpack[LossKeywords],
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
        mask, cu_seqlens, ref_logprobs, behaviour_logprobs: as in :func:`policy_loss`. The entropy of the bonus and of the
            metrics is the head's own.
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
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    like = torch.empty((), dtype=wide, device=hidden.device).expand(rows)  # stands for the log-probs to come
    tokens = check_tokens(
        logprobs=like, old_logprobs=old_logprobs, mask=mask, cu_seqlens=cu_seqlens, ref_logprobs=ref_logprobs, entropy=like,
        behaviour_logprobs=behaviour_logprobs, normalizer=normalizer, entropy_normalizer=entropy_normalizer, options=form,
        name="labels",
    )  # fmt: skip
    tokens = tokens._replace(advantages=flat_advantages(advantages, like, tokens), entropy=None)
    check_head_options(logit_scale, softcap, workspace_bytes)
    number, per_row = checks.check_temperature(temperature, rows, hidden.device)
    group_name, vocab_start = check_tp_group(tp_group, vocab_start, weight)
    name = backends.choose(OP, backend, hidden.device, hidden.dtype)

    need = [torch.is_grad_enabled() and each is not None and each.requires_grad for each in (hidden, weight, bias)]
    fused, why = backends.implementation(OP, name).fusion(hidden.device, hidden.dtype)
    if fused and not is_token_level(form, behaviour_logprobs):
        fused, why = False, "this loss weighs whole sequences"
    if fused and group_name is not None:
        fused, why = False, "the statistics of a sharded vocabulary need the group"
    if not torch.compiler.is_compiling() and any(need):
        _log(fused, why)
    head = {
        "hidden": hidden.reshape(-1, hidden.shape[-1]),
        "weight": weight,
        "bias": bias,
        "labels": labels.reshape(-1),
        "temperature_per_row": None if per_row is None else per_row.reshape(-1),
        "temperature": number,
        "logit_scale": float(logit_scale),
        "softcap": softcap,
        "workspace_bytes": workspace_bytes,
        "backend": name,
    }
    if fused and any(need):
        return run_fused(head, tokens, form, need)
    return run_composed(head, tokens, form, group_name, vocab_start)


def _log(fused: bool, why: str) -> None:
    if why not in _logged:
        _logged.add(why)
        how = "forms the gradient in the forward pass" if fused else "composes the general ops"
        logging.getLogger("mgrpo_kernels").info("%s %s: %s", OP, how, why)
