"""The definition, in plain PyTorch over blocks of whole rows of logits, whose copies are bounded by the workspace."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mgrpo_kernels.backend import reference_unsupported as unsupported
from mgrpo_kernels.ops import _statistics
from mgrpo_kernels.ops._statistics import Wanted
from mgrpo_kernels.ops.linear_token_stats.specs import Entries, Head, transform, transform_gradient

__all__ = ["backward", "forward", "sparse_backward", "unsupported"]

WORKSPACE_BYTES = 64 * 2**20
COPIES = 7  # of a block's logits, float32 (or float64), alive at once: at most 5.3 in forward and 6.6 in backward, as measured
WIDENED = 2**20  # elements of the weight copied to float32 at once


def _row_blocks(hidden: Tensor, head: Head) -> Iterator[slice]:
    row_bytes = COPIES * head.weight.shape[0] * max(4, hidden.element_size())
    rows = max(1, (head.workspace_bytes or WORKSPACE_BYTES) // row_bytes)
    for start in range(0, hidden.shape[0], rows):
        yield slice(start, min(start + rows, hidden.shape[0]))


def _logits(hidden: Tensor, head: Head) -> Tensor:
    """Return raw logits ``(n, V)`` of a block, float32 (float64 for float64 input), rounded to the head's `logits_dtype` on the way."""
    if head.raw_dtype == hidden.dtype:
        x = torch.nn.functional.linear(hidden, head.weight, head.bias)
        return x if x.dtype == torch.float64 else x.float()
    x = torch.empty(hidden.shape[0], head.weight.shape[0], device=hidden.device, dtype=torch.float32)
    wide = hidden.float()
    for columns in _column_blocks(head):
        torch.mm(wide, head.weight[columns].float().t(), out=x[:, columns])
    return x if head.bias is None else x.add_(head.bias.float())


def _column_blocks(head: Head) -> Iterator[slice]:
    """Cut the vocabulary so that the float32 copy of a part of a 16-bit weight stays small."""
    vocab, width = head.weight.shape
    at_once = max(1, WIDENED // max(1, width)) if head.weight.element_size() == 2 else vocab
    for start in range(0, vocab, at_once):
        yield slice(start, min(start + at_once, vocab))


def _rows(value: float | Tensor, block: slice) -> float | Tensor:
    return value[block] if isinstance(value, Tensor) else value


def forward(hidden: Tensor, head: Head, labels: Tensor | None, wanted: Wanted) -> Tensor:
    """Return the state ``(6, N)`` of the rows of `hidden` ``(N, H)`` over this head's part of the vocabulary."""
    states = [
        _statistics.row_state(
            transform(_logits(hidden[block], head), head, _rows(head.temperature, block)),
            None if labels is None else labels[block],
            head.vocab_start,
        )
        for block in _row_blocks(hidden, head)
    ]
    dtype = _statistics.statistics_dtype(hidden)
    state = torch.cat(states, 1) if states else hidden.new_empty((_statistics.STATE_ROWS, 0), dtype=dtype)
    return _statistics.without_unwanted(state, wanted)


def backward(
    hidden: Tensor,  # (N, H)
    head: Head,
    labels: Tensor | None,  # (N,)
    coefficients: Tensor,  # (4, N)
    logsumexp: Tensor,  # (N,)
    need: tuple[bool, bool, bool],
    wanted: Wanted,
    tolerance: float | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of hidden (float32), weight and bias (their dtype), None where `need` is False.

    With a tolerance, as many of a row's smallest logit gradients are left out as have in all a smaller share of its absolute gradient.
    """
    need_hidden, need_weight, need_bias = need
    wide = logsumexp.dtype
    grad_hidden = torch.zeros_like(hidden, dtype=wide) if need_hidden else None
    grad_weight = torch.zeros_like(head.weight, dtype=wide) if need_weight else None
    grad_bias = torch.zeros_like(head.weight[:, 0], dtype=wide) if need_bias else None
    for block in _row_blocks(hidden, head):
        x = _logits(hidden[block], head)
        temperature = _rows(head.temperature, block)
        grad_z = _statistics.row_gradient(
            transform(x, head, temperature),
            None if labels is None else labels[block],
            coefficients[:, block],
            logsumexp[block],
            head.vocab_start,
        )
        grad_x = transform_gradient(grad_z, x, head, temperature)  # (n, V)
        if tolerance is not None:
            grad_x = without_smallest(grad_x, tolerance)
        if grad_hidden is not None:
            for columns in _column_blocks(head):
                grad_hidden[block].addmm_(grad_x[:, columns], head.weight[columns].to(wide))
        if grad_weight is not None:
            grad_weight.addmm_(grad_x.T, hidden[block].to(wide))
        if grad_bias is not None:
            grad_bias += grad_x.sum(0)
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(head.weight.dtype),
        None if grad_bias is None or head.bias is None else grad_bias.to(head.bias.dtype),
    )


def sparse_backward(
    hidden: Tensor,
    head: Head,
    labels: Tensor | None,
    coefficients: Tensor,
    logsumexp: Tensor,
    need: tuple[bool, bool, bool],
    wanted: Wanted,
    tolerance: float,
    entries: Entries,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients without what the tolerance allows to leave out. The definition computes all, and needs no entries."""
    return backward(hidden, head, labels, coefficients, logsumexp, need, wanted, tolerance)


def without_smallest(grad: Tensor, tolerance: float) -> Tensor:
    """Return gradients ``(n, V)`` with 0 for the smallest of each row, as many as have a share of its absolute sum below `tolerance`."""
    magnitudes, order = grad.abs().sort(-1)
    share = magnitudes.cumsum(-1)
    left_out = share < tolerance * share[:, -1:]
    return grad.masked_fill(torch.zeros_like(left_out).scatter_(-1, order, left_out), 0.0)
