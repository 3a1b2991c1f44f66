"""The definition, in plain PyTorch: the rows of the weight that a block of tokens multiplies are gathered, a bounded number at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mgrpo_kernels.backend import reference_unsupported as unsupported
from mgrpo_kernels.ops import _statistics

__all__ = ["hidden_gradient", "logits", "unsupported", "weight_gradient"]

WORKSPACE_BYTES = 64 * 2**20
COPIES = 3  # of a block's gathered rows, float32 (or float64), alive at once: at most 2.5, as measured


def _row_blocks(ids: Tensor, width: int, wide: torch.dtype, workspace_bytes: int | None) -> Iterator[slice]:
    row_bytes = COPIES * max(1, ids.shape[1] * width) * wide.itemsize
    rows = max(1, (workspace_bytes or WORKSPACE_BYTES) // row_bytes)
    for start in range(0, ids.shape[0], rows):
        yield slice(start, min(start + rows, ids.shape[0]))


def logits(hidden: Tensor, weight: Tensor, ids: Tensor, workspace_bytes: int | None) -> Tensor:
    """Return x ``(N, K)``, each row of `hidden` times its rows of the weight, in float32 (float64); any number where ABSENT."""
    wide = _statistics.statistics_dtype(hidden)
    x = hidden.new_empty(ids.shape, dtype=wide)
    for rows in _row_blocks(ids, hidden.shape[1], wide, workspace_bytes):
        gathered = weight[ids[rows].clamp(min=0)].to(wide)  # (n, K, H)
        x[rows] = _product(gathered, hidden[rows].to(wide).unsqueeze(-1)).squeeze(-1)
    return x


def hidden_gradient(grad: Tensor, weight: Tensor, ids: Tensor, workspace_bytes: int | None) -> Tensor:
    """Return ``(N, H)``, the sum of each row's rows of the weight times `grad` ``(N, K)``, which is 0 where ABSENT."""
    result = grad.new_empty(grad.shape[0], weight.shape[1])
    for rows in _row_blocks(ids, weight.shape[1], grad.dtype, workspace_bytes):
        gathered = weight[ids[rows].clamp(min=0)].to(grad.dtype)
        gathered.masked_fill_((ids[rows] < 0).unsqueeze(-1), 0.0)  # 0 x NaN: row 0 of the weight may hold anything
        result[rows] = _product(grad[rows].unsqueeze(1), gathered).squeeze(1)
    return result


def weight_gradient(
    grad: Tensor, hidden: Tensor, ids: Tensor, weight: Tensor, need_bias: bool, workspace_bytes: int | None
) -> tuple[Tensor, Tensor | None]:
    """Return ``(V, H)`` in the weight's dtype: for each vocabulary entry the sum of its tokens' hidden states times `grad` ``(N, K)``.

    With `need_bias` also the sum of `grad` itself, ``(V,)``. Both are summed in float32 (float64), in one fixed order.
    """
    total = torch.zeros(weight.shape, dtype=grad.dtype, device=grad.device)
    bias = torch.zeros_like(total[:, 0]) if need_bias else None
    for rows in _row_blocks(ids, hidden.shape[1], grad.dtype, workspace_bytes):
        row, column = (ids[rows] >= 0).nonzero(as_tuple=True)
        entries, of_entry = ids[rows][row, column], grad[rows][row, column]
        _add(total, entries, of_entry.unsqueeze(-1) * hidden[rows][row].to(grad.dtype))
        if bias is not None:
            _add(bias, entries, of_entry)
    return total.to(weight.dtype), bias


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the batched product in the operands' dtype: where autocast is in force, it has cast hidden and weight before."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a, b)


def _add(total: Tensor, index: Tensor, values: Tensor) -> None:
    """Add `values` to rows of `total` by the function that always adds in the same order on this device."""
    if total.device.type == "cpu":
        total.index_add_(0, index, values)
    else:  # sorts, where index_add_ adds atomically
        total.index_put_((index.long(),), values, accumulate=True)
