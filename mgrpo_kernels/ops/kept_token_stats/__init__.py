"""Token statistics over the vocabulary entries that a sampler kept: what ``linear_token_stats(..., kept=ids)`` computes.

The kernels of a backend multiply each token only with the rows of the weight that it kept. Raw logits x ``(N, K)`` are stored for the
backward pass. The statistics are computed from them in plain PyTorch, a bounded number of rows at a time, because x is small.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mgrpo_kernels import backend as backends
from mgrpo_kernels import checks
from mgrpo_kernels.ops import _autograd, _statistics, _tensor_parallel
from mgrpo_kernels.ops._head import check_rows
from mgrpo_kernels.ops.kept_token_stats import native, reference, triton
from mgrpo_kernels.ops.kept_token_stats.specs import ABSENT, label_columns, local_ids
from mgrpo_kernels.ops.linear_token_stats.specs import Head, transform, transform_gradient

OP = "kept_token_stats"
WORKSPACE_BYTES = 16 * 2**20  # of what the statistics of a block of rows take
COPIES = 12  # of a block's logits, float32 (or float64), alive at once: at most 10.6, as measured
FOUND, VOCAB = (
    _statistics.STATE_ROWS,
    _statistics.STATE_ROWS + 1,
)  # of a row's state: is the label kept; vocabulary entries of the shard
backends.register(OP, reference=reference, native=native, triton=triton)


@torch.library.custom_op("mgrpo_kernels::kept_token_stats", mutates_args=())
def kept_token_stats_op(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor | None,  # (N,)
    mask: Tensor | None,  # (N,)
    temperature_per_row: Tensor | None,  # (N,) float32
    kept: Tensor,  # (N, K)
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    tp_group: str | None,
    vocab_start: int,
    workspace_bytes: int | None,
    logits_dtype: torch.dtype,
    debug: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return logprob, entropy, self_certainty, logsumexp and the number of entries, each ``(N,)``; raw logits and ids, each ``(N, K)``."""
    _autograd.refuse_tangents("linear_token_stats", hidden, weight, bias)
    _check(hidden, weight, bias, labels, mask, temperature_per_row, kept)
    checks.check_temperature_values(temperature_per_row)
    per_token = temperature if temperature_per_row is None else temperature_per_row
    head = Head(weight, bias, per_token, logit_scale, softcap, vocab_start, workspace_bytes, logits_dtype)
    ids = local_ids(kept, mask, vocab_start, weight.shape[0])
    x = backends.implementation(OP, backend).logits(hidden, weight, ids, workspace_bytes).to(head.raw_dtype)
    state = torch.cat(
        [_state(x[rows], ids[rows], _of_rows(head, rows), _cut(labels, rows)) for rows in _blocks(x, head)], 1
    )
    if tp_group is not None:
        state = _statistics.merge(_tensor_parallel.all_gather(state, tp_group))
    outside = (kept < -1) | (kept >= state[VOCAB].unsqueeze(-1))
    if debug or hidden.device.type == "cpu":
        _check_values(kept, labels, outside, state, mask, debug=debug)
    logprob, entropy, self_certainty, logsumexp = _statistics.finish(state, None)
    if labels is not None:
        logprob = torch.where(state[FOUND] > 0, logprob, torch.nan)
    bad = outside.any(-1)  # on a GPU; on a CPU it has raised by now
    statistics = [torch.where(bad, torch.nan, each) for each in (logprob, entropy, self_certainty, logsumexp)]
    if mask is not None:
        statistics = [torch.where(mask, each, 0.0) for each in statistics]
    return *statistics, state[_statistics.COUNT].clone(), x, ids


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    temperature_per_row: Tensor | None,
    ids: Tensor,
) -> None:
    check_rows(hidden, weight, bias, labels, mask, temperature_per_row)
    checks.check_tensor("kept", ids, dtypes=checks.INTS, dim=2, device=hidden.device)
    if ids.shape[0] != hidden.shape[0] or ids.shape[1] < 1:
        raise ValueError(f"kept: expected shape ({hidden.shape[0]}, K) with K >= 1, got {checks.shape_text(ids.shape)}")


def _check_values(
    kept: Tensor, labels: Tensor | None, outside: Tensor, state: Tensor, mask: Tensor | None, *, debug: bool
) -> None:
    """Raise ValueError for an id or a label outside of the vocabulary, and with `debug` for a label that its row does not keep."""
    if not state.shape[1]:
        return
    vocab = int(state[VOCAB, 0])
    bad = outside if mask is None else outside & mask.unsqueeze(-1)
    if bool(bad.any()):
        raise ValueError(
            f"kept: expected values in [0, {vocab}), or -1 where a row has fewer ids, where the mask is True, "
            f"got {kept[bad][0].item()} at {bad.nonzero()[0].tolist()}"
        )
    if labels is None:
        return
    checks.check_label_values(labels, mask, vocab)
    missing = state[FOUND] == 0
    missing = missing if mask is None else missing & mask
    if debug and bool(missing.any()):
        raise ValueError(
            "labels: expected an id that the token's row of `kept` holds, where the mask is True, "
            f"got {labels[missing][0].item()} at {missing.nonzero()[0].tolist()}"
        )


def _cut(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]


def _of_rows(head: Head, rows: slice) -> Head:
    return head._replace(temperature=head.temperature[rows]) if isinstance(head.temperature, Tensor) else head


def _blocks(x: Tensor, head: Head) -> Iterator[slice]:
    """Cut the rows of x so that what is computed of a block stays in the workspace; at least one block, which may be empty."""
    row_bytes = COPIES * x.shape[1] * max(4, x.element_size())
    step = max(1, (head.workspace_bytes or WORKSPACE_BYTES) // row_bytes)
    for start in range(0, max(1, x.shape[0]), step):
        yield slice(start, min(start + step, x.shape[0]))


def _with_bias(x: Tensor, ids: Tensor, head: Head) -> Tensor:
    """Return raw logits of a block in float32 (float64), with their bias, and 0 where there is none."""
    x = x if x.dtype == torch.float64 else x.float()
    if head.bias is not None:
        x = x + head.bias[ids.clamp(min=0)].to(x.dtype)
    return torch.where(ids >= 0, x, 0.0)


def _final(x: Tensor, ids: Tensor, head: Head) -> Tensor:
    """Return final logits of those raw ones, -inf where there is none."""
    return torch.where(ids >= 0, transform(x, head, head.temperature), -torch.inf)


def _state(x: Tensor, ids: Tensor, head: Head, labels: Tensor | None) -> Tensor:
    """Return the state ``(8, n)`` of a block: that of :mod:`_statistics`, FOUND and VOCAB. Its COUNT and SUM are over kept entries."""
    z = _final(_with_bias(x, ids, head), ids, head)
    columns = None if labels is None else label_columns(ids, labels, head.vocab_start)
    state = _statistics.row_state(z, columns)
    there = ids >= 0
    state[_statistics.SUM] = torch.where(there, z, 0.0).sum(-1)
    state[_statistics.COUNT] = there.sum(-1)
    found = torch.zeros_like(state[0]) if columns is None else (columns >= 0).to(state.dtype)
    return torch.cat([state, found.unsqueeze(0), torch.full_like(found, head.weight.shape[0]).unsqueeze(0)])


@kept_token_stats_op.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weight, kept, logits_dtype = rest[0], rest[5], rest[12]
    dtype = _statistics.statistics_dtype(hidden)
    raw = Head(weight, None, 1.0, 1.0, None, 0, None, logits_dtype).raw_dtype
    statistics = [hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(5)]
    return *statistics, hidden.new_empty(kept.shape, dtype=raw), kept.new_empty(kept.shape, dtype=torch.int32)


@torch.library.custom_op("mgrpo_kernels::kept_token_stats_backward", mutates_args=())
def kept_token_stats_backward_op(
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
    entropy: Tensor,
    logsumexp: Tensor,
    count: Tensor,
    x: Tensor,
    ids: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias, in their dtypes; those not needed are empty."""
    _check(hidden, weight, bias, labels, mask, temperature_per_row, ids)
    per_token = temperature if temperature_per_row is None else temperature_per_row
    head = Head(weight, bias, per_token, logit_scale, softcap, vocab_start, workspace_bytes, logits_dtype)
    for name, required in (("entropy", entropy), ("logsumexp", logsumexp), ("count", count), ("x", x), ("ids", ids)):
        checks.check_tensor(name, required, dtypes=(torch.int32,) if name == "ids" else checks.FLOATS)
    rows_shape, wide = hidden.shape[:1], (_statistics.statistics_dtype(hidden),)
    checks.check_inside(
        hidden.device,
        ("grad_logprob", grad_logprob, rows_shape, wide),
        ("grad_entropy", grad_entropy, rows_shape, wide),
        ("grad_self_certainty", grad_self_certainty, rows_shape, wide),
        ("entropy", entropy, rows_shape, wide),
        ("logsumexp", logsumexp, rows_shape, wide),
        ("count", count, rows_shape, wide),
        ("x", x, ids.shape, (head.raw_dtype,)),
    )
    coefficients = _statistics.gradient_coefficients(
        grad_logprob, grad_entropy, grad_self_certainty, entropy, count, mask, logsumexp
    )
    live = (coefficients != 0).any(0)  # a NaN too
    ids = torch.where(live.unsqueeze(-1), ids, ABSENT)  # a row without a gradient multiplies no rows of the weight
    grad = torch.empty(x.shape, dtype=wide[0], device=x.device)
    for rows in _blocks(x, head):
        grad[rows] = _gradient(
            x[rows], ids[rows], _of_rows(head, rows), _cut(labels, rows), coefficients[:, rows], logsumexp[rows]
        )
    kernels = backends.implementation(OP, backend)
    grad_hidden = grad_weight = grad_bias = None
    if need_hidden:
        grad_hidden = kernels.hidden_gradient(grad, weight, ids, workspace_bytes)
        if tp_group is not None:
            dist.all_reduce(grad_hidden, group=_tensor_parallel.group(tp_group))
    if need_weight or need_bias:
        grad_weight, grad_bias = kernels.weight_gradient(grad, hidden, ids, weight, need_bias, workspace_bytes)
    needed = ((grad_hidden, need_hidden), (grad_weight, need_weight), (grad_bias, need_bias))
    return tuple(  # type: ignore[return-value]
        each.to(hidden.dtype) if need and each is not None else hidden.new_empty(0) for each, need in needed
    )


def _gradient(
    x: Tensor, ids: Tensor, head: Head, labels: Tensor | None, coefficients: Tensor, logsumexp: Tensor
) -> Tensor:
    """Return the gradient of a block's raw logits, 0 where there is none."""
    x = _with_bias(x, ids, head)
    columns = None if labels is None else label_columns(ids, labels, head.vocab_start)
    grad = _statistics.row_gradient(_final(x, ids, head), columns, coefficients, logsumexp)
    return torch.where(ids >= 0, transform_gradient(grad, x, head, head.temperature), 0.0)


@kept_token_stats_backward_op.register_fake
def _(
    grad_logprob: Any, grad_entropy: Any, grad_self_certainty: Any, hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias, _ = rest[-4:]
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        hidden.new_empty(weight.shape if need_weight else (0,)),
        hidden.new_empty(weight.shape[:1] if need_bias else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _ = inputs[:7]  # all but `kept`, for which `ids` stands
    ctx.head = inputs[7:14]
    ctx.backend = inputs[15]
    _, entropy, _, logsumexp, count, x, ids = output
    ctx.set_materialize_grads(False)  # an unused statistic costs no work in backward
    ctx.mark_non_differentiable(logsumexp, count, x, ids)
    ctx.save_for_backward(*tensors, entropy, logsumexp, count, x, ids)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, entropy, logsumexp, count, x, ids = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    results = kept_token_stats_backward_op(
        *grads[:3], *tensors, *ctx.head, entropy, logsumexp, count, x, ids, *need, ctx.backend
    )
    return (*(grad if wanted else None for grad, wanted in zip(results, need, strict=True)), *[None] * 13)


_autograd.register(kept_token_stats_op, kept_token_stats_backward_op, _backward, _setup_context)
