"""Token statistics straight from hidden states: the language-model head and the statistics fused, in a bounded workspace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mgrpo_kernels import backend as backends
from mgrpo_kernels import checks
from mgrpo_kernels.ops._head import (
    check_gradient_tolerance,
    check_head,
    check_head_options,
    check_kept,
    check_logits_dtype,
    check_tp_group,
    flat_rows,
)
from mgrpo_kernels.ops._rows import check_counts
from mgrpo_kernels.ops.kept_token_stats import kept_token_stats_op
from mgrpo_kernels.ops.linear_token_stats import liger, tiled
from mgrpo_kernels.ops.linear_token_stats.layers import linear
from mgrpo_kernels.ops.linear_token_stats.op import OP, linear_token_stats_op
from mgrpo_kernels.ops.token_stats.specs import TokenStats, check_stats

LOGITS_COLUMNS = (
    4096  # of whole logits on a CPU at once: what a 16-bit matmul rearranges of the weight stays in the cache
)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    *,
    bias: Tensor | None = None,
    stats: Sequence[str] = ("logprob", "entropy"),
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    unmasked_tokens: int | None = None,
    tokens_with_gradient: int | None = None,
    kept: Tensor | None = None,
    gradient_tolerance: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    workspace_bytes: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    debug: bool = False,
) -> TokenStats:
    """Return :func:`token_stats_from_logits` of the logits that a head gives for `hidden`, in a bounded workspace.

    With 16-bit operands the logits are those of a float32 head, at the speed of 16-bit matmuls: products of 16-bit numbers are exact in
    float32, and the matmul's float32 sums are not rounded.

    x = hidden @ weight.T + bias;  y = logit_scale x, then softcap tanh(y / softcap);  z = y / temperature. The library's matmul
    fills one tile of logits at a time in a reused workspace. Where a gradient is required, the tiles for which the workspace has
    room are stored until the backward pass, which computes the others again. It forms the gradient of each tile, and multiplies that
    with the weight and the hidden states. Gradients accumulate in float32. Under autocast the op computes in the autocast
    dtype, like ``torch.nn.functional.linear``, with autocast's own cast of the weight.

    The logits workspace, stored logits included, is bounded by `workspace_bytes`, whatever the number of tokens, forward and backward. By
    default it takes at most 224 MiB (native; without a gradient 4 MiB, or 8 MiB in 16 bits), 512 MiB (triton) or 64 MiB (reference).

    Args:
        hidden: ``(..., H)`` float32, bfloat16 or float16 (float64 on the reference backend).
        weight: ``(V, H)``, of hidden's dtype. With `tp_group` this rank's rows of it; shards may be uneven.
        labels: ``(...)`` int32 or int64, already shifted, over the whole vocabulary; None if "logprob" is not asked for.
        bias: ``(V,)`` or None.
        stats: names out of "logprob", "entropy", "self_certainty".
        temperature: a number > 0, or a tensor that broadcasts to ``(...)`` (it gets no gradient).
        logit_scale: finite; multiplies the logits (Cohere's logit_scale, the inverse of Granite's logits_scaling).
        softcap: > 0 or None (Gemma's final_logit_softcapping).
        mask: ``(...)`` bool, True counts. A masked row gives exactly 0 and no gradient, whatever hidden holds there.
        unmasked_tokens: number of True in `mask`, if the caller knows it. On a GPU masked rows are left out of the matmuls only with it,
            because counting them means waiting for the device; a wrong number there makes every result NaN. Not used with `kept`.
        tokens_with_gradient: number of tokens, at most, whose statistics have a gradient that is not 0, if the caller knows it. On a GPU
            the backward pass leaves out the rows of the others only with it; too low a number there makes every gradient NaN. Not used
            with `kept`.
        kept: ``(..., K)`` int32 or int64, the vocabulary entries that the sampler kept for each token, in any order, -1 where a token has
            fewer than K; an entry that is given twice counts once. Everything is of the softmax over this set alone, with N K H operations
            in place of N V H. A label outside its token's set gives NaN, and a token without any entry gives NaN for every statistic.
        gradient_tolerance: None for exact gradients, or a number in (0, 1): the backward pass may leave out, in each row, logits whose
            share of the row's absolute logit gradient is below it in all. Statistics are the same bits as without, or agree to rounding
            where a GPU's tuning has ``matmul="fused"``. The native and the triton backend keep the largest logits of each row (up to 4096
            and V / 16 or V / 12, 8 bytes each, until the backward pass).
            The native one multiplies those that the row needs; the triton one waits for the device once in the backward pass, and
            multiplies those columns of the vocabulary that any row needs with the rows of no less a need. A row that needs more, and one
            with a gradient of self_certainty, is computed exactly. Nothing is left out with `kept`.
        tp_group: process group over which the vocabulary is sharded. Every rank gets the full result.
        vocab_start: vocabulary entry of this rank's first row. None asks the group, once a call (one small collective).
        workspace_bytes: bound of the logits workspace, at least 64 KiB; None takes the backend's own. With a larger one the backward pass
            computes fewer logits again, and more memory is held between the passes. The reference backend, which takes
            whole rows of logits, uses 28 bytes for each vocabulary entry (56 in float64) where that is more.
        logits_dtype: dtype of the logits in the workspace where hidden and weight have 16 bits: float32, or their own, as a plain 16-bit
            head has it. That halves the workspace and rounds each logit: between 16 and 32 by up to 0.06 in bfloat16.
        backend: ``reference``, ``native`` or ``triton``; None picks one of them. ``liger`` is Liger's kernel for bfloat16 on NVIDIA GPUs of
            compute capability 9.0 and 10.x, which has fewer options and a lower precision.
        debug: on a GPU, pay a host sync to raise for a bad label and a wrong `unmasked_tokens`; with `kept`, also raise for a label
            outside its token's set.

    Returns:
        TokenStats of float32 (float64 for float64 input), ``(...)``; None where a statistic was not asked for.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, device or option; on a CPU also a wrong `unmasked_tokens`, too low a `tokens_with_gradient` (in the
            backward pass), and an unmasked label, or an unmasked entry of `kept`, outside the vocabulary (on a GPU: NaN).
        BackendUnavailable: `backend` cannot run here.
    """
    wanted = check_stats(stats)
    hidden, weight, bias = check_head(hidden, weight, bias)
    rows = hidden.shape[:-1]
    mask = checks.check_mask("mask", mask, rows, hidden.device)
    flat = flat_rows(hidden)
    check_counts(mask, flat.shape[0], unmasked_tokens, tokens_with_gradient)
    number, per_row = checks.check_temperature(temperature, rows, hidden.device)
    check_head_options(logit_scale, softcap, workspace_bytes)
    check_logits_dtype(logits_dtype, hidden.dtype)
    check_gradient_tolerance(gradient_tolerance)
    checks.check_flag("debug", debug)
    if not wanted.logprob:
        labels = None
    elif labels is None:
        raise ValueError('labels: expected a tensor when stats has "logprob", got None')
    else:
        labels = checks.check_tensor("labels", labels, dtypes=checks.INTS, shape=rows, device=hidden.device).reshape(-1)
    group_name, vocab_start = check_tp_group(tp_group, vocab_start, weight)

    kept = check_kept(kept, rows, hidden.device)
    name = backends.choose(OP, backend, hidden.device, hidden.dtype)
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    tensors = (
        flat,
        weight,
        bias,
        labels,
        None if mask is None else mask.reshape(-1),
        None if per_row is None else per_row.reshape(-1),
    )
    options = (number, float(logit_scale), softcap, group_name, vocab_start, workspace_bytes, logits_dtype)
    if name == "liger":
        lacking = {"softcap": softcap, "kept": kept, "gradient_tolerance": gradient_tolerance, "tp_group": tp_group}
        lacking |= {
            "tokens_with_gradient": tokens_with_gradient,
            "bias": bias,
            "workspace_bytes": workspace_bytes,
            "temperature": per_row,
        }
        liger.refuse(wanted, logit_scale, logits_dtype, lacking)
        found = liger.token_stats(
            *tensors[:2], *tensors[3:5], number / logit_scale, wanted, unmasked_tokens=unmasked_tokens, debug=debug
        )
        return TokenStats(*[None if stat is None else stat.view(rows) for stat in found])
    if kept is None:
        logprob, entropy, self_certainty, *_ = linear_token_stats_op(
            *tensors,
            *options,
            unmasked_tokens,
            tokens_with_gradient,
            wanted.entropy,
            wanted.self_certainty,
            gradient,
            gradient_tolerance if gradient else None,
            debug,
            name,
        )
    else:
        logprob, entropy, self_certainty, *_ = kept_token_stats_op(*tensors, kept, *options, debug, name)
    return TokenStats(
        logprob.view(rows) if wanted.logprob else None,
        entropy.view(rows) if wanted.entropy else None,
        self_certainty.view(rows) if wanted.self_certainty else None,
    )


@torch.no_grad()
def float32_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return raw logits ``(N, V)`` of a whole head as :func:`linear_token_stats` computes them, without a gradient.

    For the few rows of which a sampler needs all logits. They are float32 (float64 for float64 operands); autocast casts the operands.
    """
    hidden, weight, bias = check_head(hidden, weight, bias)
    if hidden.dtype == torch.float32:
        return linear(hidden, weight, bias)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = torch.empty(hidden.shape[0], weight.shape[0], device=hidden.device, dtype=wide)
    at_once = weight.shape[0] if hidden.device.type == "cuda" else LOGITS_COLUMNS
    for columns in tiled.spans(weight.shape[0], at_once):
        tiled.accumulate(logits[:, columns], hidden, weight[columns].t(), first=True)
    return logits if bias is None else logits.add_(bias)
