"""Token statistics straight from hidden states: the language-model head and the statistics fused, in a bounded workspace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mgrpo_kernels import backend as backends
from mgrpo_kernels import checks
from mgrpo_kernels.ops import _autograd, _statistics, _tensor_parallel
from mgrpo_kernels.ops._head import (
    check_gradient_tolerance,
    check_head,
    check_head_options,
    check_kept,
    check_logits_dtype,
    check_rows,
    check_tp_group,
)
from mgrpo_kernels.ops.kept_token_stats import kept_token_stats_op
from mgrpo_kernels.ops.linear_token_stats import native, reference, tiled, triton
from mgrpo_kernels.ops.linear_token_stats.specs import Entries, Head
from mgrpo_kernels.ops.token_stats.specs import TokenStats, check_stats

OP = "linear_token_stats"
LOGITS_COLUMNS = (
    4096  # of whole logits on a CPU at once: what a 16-bit matmul rearranges of the weight stays in the cache
)
backends.register(OP, reference=reference, native=native, triton=triton)


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
    fills one tile of logits at a time in a reused workspace; backward computes each tile again, then its gradient,
    and multiplies that with the weight and the hidden states. Gradients accumulate in float32. Under autocast the op
    computes in the autocast dtype, like ``torch.nn.functional.linear``, with autocast's own cast of the weight.

    The logits workspace is bounded by `workspace_bytes`, whatever the number of tokens, forward and backward. By default it takes at most
    4 MiB in float32, 8 MiB forward and 12 MiB backward in 16 bits (native), 512 MiB (triton) or 64 MiB (reference).

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
        kept: ``(..., K)`` int32 or int64, the vocabulary entries that the sampler kept for each token, in any order, -1 where a token has
            fewer than K; an entry that is given twice counts once. Everything is of the softmax over this set alone, with N K H operations
            in place of N V H. A label outside its token's set gives NaN, and a token without any entry gives NaN for every statistic.
        gradient_tolerance: None for exact gradients, or a number in (0, 1): the backward pass may leave out, in each row, logits whose
            share of the row's absolute logit gradient is below it in all. Statistics are the same bits as without. The native backend
            then keeps the largest logits of each row (up to 4096 or V / 12, 8 bytes each, until the backward pass) and multiplies those
            alone; a row that needs more, and one with a gradient of self_certainty, is computed exactly. The triton backend leaves nothing
            out, nor does any with `kept`.
        tp_group: process group over which the vocabulary is sharded. Every rank gets the full result.
        vocab_start: vocabulary entry of this rank's first row. None asks the group, once a call (one small collective).
        workspace_bytes: bound of the logits workspace, at least 64 KiB; None takes the backend's own. The reference backend, which takes
            whole rows of logits, uses 28 bytes for each vocabulary entry (56 in float64) where that is more.
        logits_dtype: dtype of the logits in the workspace where hidden and weight have 16 bits: float32, or their own, as a plain 16-bit
            head has it. That halves the workspace and rounds each logit: between 16 and 32 by up to 0.06 in bfloat16.
        backend: ``reference``, ``native`` or ``triton``; None picks.
        debug: on a GPU, pay a host sync to raise for a bad label; with `kept`, also raise for a label outside its token's set.

    Returns:
        TokenStats of float32 (float64 for float64 input), ``(...)``; None where a statistic was not asked for.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, device or option; on a CPU also an unmasked label, or an unmasked entry of `kept`, outside the
            vocabulary (on a GPU: NaN).
        BackendUnavailable: `backend` cannot run here.
    """
    wanted = check_stats(stats)
    hidden, weight, bias = check_head(hidden, weight, bias)
    rows = hidden.shape[:-1]
    mask = checks.check_mask("mask", mask, rows, hidden.device)
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
    tensors = (
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        labels,
        None if mask is None else mask.reshape(-1),
        None if per_row is None else per_row.reshape(-1),
    )
    options = (number, float(logit_scale), softcap, group_name, vocab_start, workspace_bytes, logits_dtype)
    if kept is None:
        logprob, entropy, self_certainty, *_ = linear_token_stats_op(
            *tensors, *options, gradient_tolerance, debug, name
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
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = torch.empty(hidden.shape[0], weight.shape[0], device=hidden.device, dtype=wide)
    at_once = weight.shape[0] if hidden.device.type == "cuda" else LOGITS_COLUMNS
    for columns in tiled.spans(weight.shape[0], at_once):
        tiled.accumulate(logits[:, columns], hidden, weight[columns].t(), first=True)
    return logits if bias is None else logits.add_(bias)


@torch.library.custom_op("mgrpo_kernels::linear_token_stats", mutates_args=())
def linear_token_stats_op(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor | None,  # (N,)
    mask: Tensor | None,  # (N,)
    temperature_per_row: Tensor | None,  # (N,) float32
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    tp_group: str | None,
    vocab_start: int,
    workspace_bytes: int | None,
    logits_dtype: torch.dtype,
    gradient_tolerance: float | None,
    debug: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return logprob, entropy, self_certainty, logsumexp, each ``(N,)``; the size of the whole vocabulary, 0-d; and the four tensors of
    :class:`Entries`, empty where the backward pass does without. Of masked rows, which may have none, those come last.
    """
    _autograd.refuse_tangents("linear_token_stats", hidden, weight, bias)
    check_rows(hidden, weight, bias, labels, mask, temperature_per_row)
    checks.check_temperature_values(temperature_per_row)
    per_token = temperature if temperature_per_row is None else temperature_per_row
    head = Head(weight, bias, per_token, logit_scale, softcap, vocab_start, workspace_bytes, logits_dtype)
    rows = kept_rows(mask)
    implementation = backends.implementation(OP, backend)
    inputs = take(hidden, rows), head._replace(temperature=take(head.temperature, rows)), take(labels, rows)
    entries = Entries.empty(hidden.shape[0], entries_room(backend, weight, gradient_tolerance), hidden.device)
    if entries.room:
        state = implementation.sparse_forward(*inputs, gradient_tolerance, entries.of_rows(slice(inputs[0].shape[0])))
    else:
        state = implementation.forward(*inputs)
    if tp_group is not None:
        state = _statistics.merge(_tensor_parallel.all_gather(state, tp_group))
    vocab = state.new_full((), weight.shape[0]) if tp_group is None else _vocab_size(state, weight, tp_group)
    if labels is not None and (debug or hidden.device.type == "cpu"):
        checks.check_label_values(labels, mask, int(vocab))
    statistics = list(_statistics.finish(state, take(labels, rows)))
    if rows is not None:
        statistics = [stat.new_zeros(hidden.shape[0]).index_copy_(0, rows, stat) for stat in statistics]
    elif mask is not None:
        statistics = [torch.where(mask, stat, 0.0) for stat in statistics]
    logprob, entropy, self_certainty, logsumexp = statistics
    return logprob, entropy, self_certainty, logsumexp, vocab, *entries


def can_leave_out(backend: str) -> bool:
    """Return whether the backend leaves entries without a share of the gradient out of the backward pass."""
    return hasattr(backends.implementation(OP, backend), "sparse_backward")


def entries_room(backend: str, weight: Tensor, tolerance: float | None) -> int:
    """Return for how many entries of a row there is room between the passes: 0 where the gradient is formed without."""
    room = getattr(backends.implementation(OP, backend), "entries_room", None)
    return 0 if tolerance is None or room is None else int(room(weight.shape[0]))


@linear_token_stats_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _statistics.statistics_dtype(hidden)
    logprob, entropy, self_certainty, logsumexp = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(4))
    *_, tolerance, _, backend = rest
    entries = Entries.empty(hidden.shape[0], entries_room(backend, weight, tolerance), hidden.device)
    return logprob, entropy, self_certainty, logsumexp, hidden.new_empty((), dtype=dtype), *entries


@torch.library.custom_op("mgrpo_kernels::linear_token_stats_backward", mutates_args=())
def linear_token_stats_backward_op(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_self_certainty: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    temperature_per_row: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    tp_group: str | None,
    vocab_start: int,
    workspace_bytes: int | None,
    logits_dtype: torch.dtype,
    gradient_tolerance: float | None,
    entropy: Tensor,
    logsumexp: Tensor,
    vocab: Tensor,
    entry_ids: Tensor,
    entry_logits: Tensor,
    entry_counts: Tensor,
    entry_rest: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias, in their dtypes; those not needed are empty."""
    check_rows(hidden, weight, bias, labels, mask, temperature_per_row)
    given = {"entropy": entropy, "logsumexp": logsumexp, "vocab": vocab}
    given |= {
        "entry_ids": entry_ids,
        "entry_logits": entry_logits,
        "entry_counts": entry_counts,
        "entry_rest": entry_rest,
    }
    for name, required in given.items():
        # not None, which the dispatcher lets pass
        checks.check_tensor(name, required, dtypes=(*checks.FLOATS, torch.int32))
    rows_shape, wide = hidden.shape[:1], (_statistics.statistics_dtype(hidden),)
    room = entry_ids.shape[-1] if entry_ids.dim() else 0
    entries_rows = hidden.shape[0] if room else 0
    checks.check_inside(
        hidden.device,
        ("grad_logprob", grad_logprob, rows_shape, wide),
        ("grad_entropy", grad_entropy, rows_shape, wide),
        ("grad_self_certainty", grad_self_certainty, rows_shape, wide),
        ("entropy", entropy, rows_shape, wide),
        ("logsumexp", logsumexp, rows_shape, wide),
        ("vocab", vocab, (), wide),
        ("entry_ids", entry_ids, (entries_rows, room), (torch.int32,)),
        ("entry_logits", entry_logits, (entries_rows, room), (torch.float32,)),
        ("entry_counts", entry_counts, (entries_rows,), (torch.int32,)),
        ("entry_rest", entry_rest, (4, entries_rows), (torch.float32,)),
    )
    coefficients = _statistics.gradient_coefficients(
        grad_logprob, grad_entropy, grad_self_certainty, entropy, vocab, mask, logsumexp
    )
    per_token = temperature if temperature_per_row is None else temperature_per_row
    head = Head(weight, bias, per_token, logit_scale, softcap, vocab_start, workspace_bytes, logits_dtype)
    implementation = backends.implementation(OP, backend)
    sparse = gradient_tolerance is not None and can_leave_out(backend)
    rows = kept_rows(mask) if sparse else live_rows(coefficients)
    kept = take(hidden, rows)
    if rows is None and mask is not None:
        kept = torch.where(mask.unsqueeze(-1), hidden, 0.0)  # 0 x NaN would reach the weight's gradient
    inputs = (
        kept,
        head._replace(temperature=take(head.temperature, rows)),
        take(labels, rows),
        coefficients if rows is None else coefficients[:, rows],
        take(logsumexp, rows),
        (need_hidden, need_weight, need_bias),
    )
    if sparse:
        entries = Entries(entry_ids, entry_logits, entry_counts, entry_rest).of_rows(slice(kept.shape[0]))
        grad_hidden, grad_weight, grad_bias = implementation.sparse_backward(*inputs, gradient_tolerance, entries)
    else:
        grad_hidden, grad_weight, grad_bias = implementation.backward(*inputs)
    if grad_hidden is not None:
        if tp_group is not None:
            dist.all_reduce(grad_hidden, group=_tensor_parallel.group(tp_group))
        grad_hidden = grad_hidden.to(hidden.dtype)
        if rows is not None:
            grad_hidden = torch.zeros_like(hidden).index_copy_(0, rows, grad_hidden)
    return tuple(hidden.new_empty(0) if grad is None else grad for grad in (grad_hidden, grad_weight, grad_bias))  # type: ignore[return-value]


@linear_token_stats_backward_op.register_fake
def _(
    grad_logprob: Any,
    grad_entropy: Any,
    grad_self_certainty: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias, _ = rest[-4:]
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        hidden.new_empty(weight.shape if need_weight else (0,)),
        hidden.new_empty(weight.shape[:1] if need_bias else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        *tensors,
        ctx.temperature,
        ctx.logit_scale,
        ctx.softcap,
        ctx.tp_group,
        ctx.vocab_start,
        ctx.workspace,
        ctx.logits_dtype,
        ctx.tolerance,
        _,
        ctx.backend,
    ) = inputs
    _, entropy, _, *others = output
    ctx.set_materialize_grads(False)  # an unused statistic costs no work in backward
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(*tensors, entropy, *others)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, mask, per_row, *saved = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    results = linear_token_stats_backward_op(
        *grads[:3], hidden, weight, bias, labels, mask, per_row, ctx.temperature, ctx.logit_scale, ctx.softcap, ctx.tp_group,
        ctx.vocab_start, ctx.workspace, ctx.logits_dtype, ctx.tolerance, *saved, *need, ctx.backend,
    )  # fmt: skip
    return (*(grad if wanted else None for grad, wanted in zip(results, need, strict=True)), *[None] * 13)


_autograd.register(linear_token_stats_op, linear_token_stats_backward_op, _backward, _setup_context)


def kept_rows(mask: Tensor | None) -> Tensor | None:
    """On a CPU, masked rows are left out of the matmuls. On a GPU their number is unknown without a host sync: None."""
    return mask.nonzero().squeeze(-1) if mask is not None and mask.device.type == "cpu" else None


def live_rows(coefficients: Tensor) -> Tensor | None:
    """On a CPU, rows whose logits have no gradient are left out of the backward pass's matmuls. None: there are no others, or on a GPU."""
    if coefficients.device.type != "cpu":
        return None
    live = (coefficients != 0).any(0)  # a NaN too
    return None if live.all() else live.nonzero().squeeze(-1)


def take(value: Any, rows: Tensor | None) -> Any:
    """Return these rows of a tensor; anything else, and everything for None, as it is."""
    return value[rows] if isinstance(value, Tensor) and rows is not None else value


def _vocab_size(state: Tensor, weight: Tensor, tp_group: str) -> Tensor:
    if state.shape[1]:
        return state[_statistics.COUNT, 0].clone()
    vocab = state.new_full((), weight.shape[0])  # no rows to carry the count
    dist.all_reduce(vocab, group=_tensor_parallel.group(tp_group))
    return vocab
