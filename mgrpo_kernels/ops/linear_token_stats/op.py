"""The custom ops of the statistics of a fused head: their checks, their fakes and their autograd formula."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mgrpo_kernels import backend as backends
from mgrpo_kernels import checks
from mgrpo_kernels.ops import _autograd, _statistics, _tensor_parallel
from mgrpo_kernels.ops._head import check_rows
from mgrpo_kernels.ops._rows import (
    Kept,
    can_read,
    check_counts,
    first_rows,
    kept_rows,
    number_with_gradient,
    put_back,
    spoil,
    take,
    take_hidden,
)
from mgrpo_kernels.ops._statistics import Wanted
from mgrpo_kernels.ops.linear_token_stats import liger, native, reference, tiled, triton
from mgrpo_kernels.ops.linear_token_stats.specs import Entries, Head

OP = "linear_token_stats"
# Extra elements after the stored logits: torch.compile and torch.export specialise on the sizes 0 and 1, and the number of tokens decides
# whether any logits are stored.
SPARE = 2
backends.register(OP, reference=reference, native=native, triton=triton, liger=liger)


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
    unmasked_tokens: int | None,
    tokens_with_gradient: int | None,
    want_entropy: bool,
    want_self_certainty: bool,
    store_logits: bool,
    gradient_tolerance: float | None,
    debug: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return logprob, entropy, self_certainty, logsumexp, each ``(N,)``; the size of the whole vocabulary, 0-d; the four tensors of
    :class:`Entries`, empty where the backward pass does without; and raw logits (:class:`tiled.Stored`), if `store_logits`, as far as there
    is room, and SPARE more elements. Of masked rows, which have no logits and may have no entries, those come last. Statistics that are
    not wanted are empty, and so is logprob without labels.
    """
    _autograd.refuse_tangents("linear_token_stats", hidden, weight, bias)
    check_rows(hidden, weight, bias, labels, mask, temperature_per_row)
    check_counts(mask, hidden.shape[0], unmasked_tokens, tokens_with_gradient)
    checks.check_temperature_values(temperature_per_row)
    per_token = temperature if temperature_per_row is None else temperature_per_row
    head = Head(weight, bias, per_token, logit_scale, softcap, vocab_start, workspace_bytes, logits_dtype)
    kept = kept_rows(mask, hidden.shape[0], unmasked_tokens, debug=debug)
    rows = kept.rows
    implementation = backends.implementation(OP, backend)
    wanted = Wanted(labels is not None, want_entropy, want_self_certainty)
    inputs = take(hidden, rows), head._replace(temperature=take(head.temperature, rows)), take(labels, rows), wanted
    entries = Entries.empty(hidden.shape[0], entries_room(backend, weight, gradient_tolerance), hidden.device)
    logits = _empty_logits(hidden, unmasked_tokens, head, backend, store=store_logits and not entries.room)
    if can_read(hidden.device):
        logits[-SPARE:] = 0.0  # for torch.library.opcheck, which compares outputs; on a GPU not worth a launch
    if entries.room:
        state = implementation.sparse_forward(*inputs, gradient_tolerance, entries.of_rows(slice(inputs[0].shape[0])))
    elif logits.numel() > SPARE:
        state = implementation.forward(*inputs, tiled.Stored(logits[:-SPARE], inputs[0].shape[0]))
    else:
        state = implementation.forward(*inputs)
    if tp_group is not None:
        state = _statistics.merge(_tensor_parallel.all_gather(state, tp_group))
    vocab = state.new_full((), weight.shape[0]) if tp_group is None else _vocab_size(state, weight, tp_group)
    if labels is not None and (debug or hidden.device.type == "cpu"):
        checks.check_label_values(labels, mask, int(vocab))
    logprob, entropy, self_certainty, logsumexp = (
        _of_all_rows(stat, mask, kept) if want else stat.new_empty(0)
        for stat, want in zip(_statistics.finish(state, take(labels, rows)), (*wanted, True), strict=True)
    )
    return logprob, entropy, self_certainty, logsumexp, vocab, *entries, logits


def _of_all_rows(stat: Tensor, mask: Tensor | None, kept: Kept) -> Tensor:
    """Return a statistic of the kept rows with the masked rows, which are 0; NaN everywhere if the caller's count is wrong."""
    if mask is None:
        return stat
    stat = put_back(stat, kept.rows, mask.shape[0])
    return spoil(torch.where(mask, stat, 0.0) if kept.masked else stat, kept.wrong)


def can_leave_out(backend: str) -> bool:
    """Return whether the backend leaves entries without a share of the gradient out of the backward pass."""
    return hasattr(backends.implementation(OP, backend), "sparse_backward")


def entries_room(backend: str, weight: Tensor, tolerance: float | None) -> int:
    """Return for how many entries of a row there is room between the passes: 0 where the gradient is formed without."""
    room = getattr(backends.implementation(OP, backend), "entries_room", None)
    return 0 if tolerance is None or room is None else int(room(weight.shape[0]))


def logits_room(backend: str, number: int, head: Head) -> int:
    """Return how many raw logits the forward pass stores for the backward pass. `number`, of all rows, may be symbolic."""
    room = getattr(backends.implementation(OP, backend), "logits_room", None)
    return 0 if room is None else room(number, head)


def _empty_logits(hidden: Tensor, unmasked_tokens: int | None, head: Head, backend: str, *, store: bool) -> Tensor:
    """Return room for the raw logits that are stored between the passes, which may be symbolic, and SPARE more; empty without `store`."""
    number = hidden.shape[0] if unmasked_tokens is None else unmasked_tokens
    return hidden.new_empty(logits_room(backend, number, head) + SPARE if store else 0, dtype=head.raw_dtype)


@linear_token_stats_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _statistics.statistics_dtype(hidden)
    (
        *_,
        workspace_bytes,
        logits_dtype,
        unmasked_tokens,
        _,
        want_entropy,
        want_self_certainty,
        store_logits,
        tolerance,
        _,
        backend,
    ) = rest
    logprob, entropy, self_certainty, logsumexp = (
        hidden.new_empty(hidden.shape[0] if want else 0, dtype=dtype)
        for want in (labels is not None, want_entropy, want_self_certainty, True)
    )
    entries = Entries.empty(hidden.shape[0], entries_room(backend, weight, tolerance), hidden.device)
    head = Head(weight, None, 1.0, 1.0, None, 0, workspace_bytes, logits_dtype)
    logits = _empty_logits(hidden, unmasked_tokens, head, backend, store=store_logits and not entries.room)
    return logprob, entropy, self_certainty, logsumexp, hidden.new_empty((), dtype=dtype), *entries, logits


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
    unmasked_tokens: int | None,
    tokens_with_gradient: int | None,
    gradient_tolerance: float | None,
    entropy: Tensor | None,
    logsumexp: Tensor,
    vocab: Tensor,
    entry_ids: Tensor,
    entry_logits: Tensor,
    entry_counts: Tensor,
    entry_rest: Tensor,
    logits: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias, in their dtypes; those not needed are empty."""
    check_rows(hidden, weight, bias, labels, mask, temperature_per_row)
    check_counts(mask, hidden.shape[0], unmasked_tokens, tokens_with_gradient)
    if (grad_logprob is not None and labels is None) or (grad_entropy is not None and entropy is None):
        raise ValueError("expected labels with grad_logprob and entropy with grad_entropy, got None")
    given = {"logsumexp": logsumexp, "vocab": vocab}
    given |= {
        "entry_ids": entry_ids,
        "entry_logits": entry_logits,
        "entry_counts": entry_counts,
        "entry_rest": entry_rest,
        "logits": logits,
    }
    for name, required in given.items():
        # not None, which the dispatcher lets pass
        checks.check_tensor(name, required, dtypes=(*checks.FLOATS, torch.int32))
    per_token = temperature if temperature_per_row is None else temperature_per_row
    head = Head(weight, bias, per_token, logit_scale, softcap, vocab_start, workspace_bytes, logits_dtype)
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
        ("logits", logits, (logits.numel(),), (head.raw_dtype,)),
    )
    coefficients = _statistics.gradient_coefficients(
        grad_logprob, grad_entropy, grad_self_certainty, entropy, vocab, mask, logsumexp
    )
    implementation = backends.implementation(OP, backend)
    sparse = gradient_tolerance is not None and can_leave_out(backend)
    kept = kept_rows(mask, hidden.shape[0], unmasked_tokens)
    live = (coefficients != 0).any(0)  # a NaN too
    number, too_low = number_with_gradient(live, kept, tokens_with_gradient)
    rows = kept.rows if sparse or number == kept.number else first_rows(number, live, mask)
    coefficients = spoil(coefficients, kept.wrong, too_low)
    taken = take_hidden(hidden, rows, mask, kept)
    wanted = Wanted(grad_logprob is not None, grad_entropy is not None, grad_self_certainty is not None)
    inputs = (
        taken,
        head._replace(temperature=take(head.temperature, rows)),
        take(labels if wanted.logprob else None, rows),
        coefficients if rows is None else coefficients[:, rows],
        take(logsumexp, rows),
        (need_hidden, need_weight, need_bias),
        wanted,
    )
    if sparse:
        entries = Entries(entry_ids, entry_logits, entry_counts, entry_rest).of_rows(slice(taken.shape[0]))
        grad_hidden, grad_weight, grad_bias = implementation.sparse_backward(*inputs, gradient_tolerance, entries)
    elif logits.numel() > SPARE:
        grad_hidden, grad_weight, grad_bias = implementation.backward(*inputs, stored_rows(logits, kept, rows))
    else:
        grad_hidden, grad_weight, grad_bias = implementation.backward(*inputs)
    if grad_hidden is not None:
        if tp_group is not None:
            dist.all_reduce(grad_hidden, group=_tensor_parallel.group(tp_group))
        grad_hidden = spoil(put_back(grad_hidden.to(hidden.dtype), rows, hidden.shape[0]), kept.wrong, too_low)
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
        ctx.unmasked_tokens,
        ctx.tokens_with_gradient,
        want_entropy,
        want_self_certainty,
        _,
        ctx.tolerance,
        _,
        ctx.backend,
    ) = inputs
    wanted = Wanted(tensors[3] is not None, want_entropy, want_self_certainty)
    _, entropy, _, *others = output
    ctx.set_materialize_grads(False)  # an unused statistic costs no work in backward
    ctx.mark_non_differentiable(*others, *(stat for stat, want in zip(output, wanted, strict=False) if not want))
    ctx.save_for_backward(*tensors, entropy if want_entropy else None, *others)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, mask, per_row, *saved = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    results = linear_token_stats_backward_op(
        *grads[:3], hidden, weight, bias, labels, mask, per_row, ctx.temperature, ctx.logit_scale, ctx.softcap, ctx.tp_group,
        ctx.vocab_start, ctx.workspace, ctx.logits_dtype, ctx.unmasked_tokens, ctx.tokens_with_gradient, ctx.tolerance, *saved, *need,
        ctx.backend,
    )  # fmt: skip
    return (*(grad if wanted else None for grad, wanted in zip(results, need, strict=True)), *[None] * 18)


_autograd.register(linear_token_stats_op, linear_token_stats_backward_op, _backward, _setup_context)


def stored_rows(logits: Tensor, kept: Kept, rows: Tensor | None) -> tiled.Stored:
    """Return the stored logits of these rows (None: all). The forward pass stored those of the kept ones."""
    # Triton's interpreter writes a kernel's arguments back, unchanged; another backward pass would take that for a change of them.
    logits = logits.data[:-SPARE]
    if kept.rows is None or rows is None:
        return tiled.Stored(logits, kept.number, rows)
    return tiled.Stored(logits, kept.number, None if rows is kept.rows else torch.searchsorted(kept.rows, rows))


def _vocab_size(state: Tensor, weight: Tensor, tp_group: str) -> Tensor:
    if state.shape[1]:
        return state[_statistics.COUNT, 0].clone()
    vocab = state.new_full((), weight.shape[0])  # no rows to carry the count
    dist.all_reduce(vocab, group=_tensor_parallel.group(tp_group))
    return vocab
