"""Triton for GPUs: one kernel reads the logits once forward, one reads and writes them once backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels.backend import triton_unsupported as unsupported
from mgrpo_kernels.ops._statistics import Wanted
from mgrpo_kernels.ops._triton import tuning
from mgrpo_kernels.ops._triton.launch import launch, parts_of_row, power_of_2, row_tile

__all__ = ["backward", "forward", "unsupported"]


def forward(
    logits: Tensor,  # (..., V)
    labels: Tensor | None,  # (..., K)
    mask: Tensor | None,  # (...)
    temperature: float | Tensor,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logprob ``(..., K)``, entropy, self_certainty, logsumexp ``(...)``; those not wanted are empty."""
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    rows = shape.numel()
    logprob = torch.empty(
        labels.shape if wanted.logprob and labels is not None else (0,), dtype=torch.float32, device=logits.device
    )
    entropy, self_certainty, logsumexp = (
        torch.empty(shape if want else (0,), dtype=torch.float32, device=logits.device)
        for want in (wanted.entropy, wanted.self_certainty, True)
    )
    if rows == 0:
        return logprob, entropy, self_certainty, logsumexp
    from mgrpo_kernels.ops.token_stats import _triton_kernels as kernels

    if _strides(logits) is None:
        logits = logits.contiguous()
    tile = row_tile(vocab, logits.element_size(), *tuning.of(logits.device).stats_forward)
    parts, part = parts_of_row(rows, vocab, tile, logits.device)
    states = logsumexp.new_empty(rows, parts, 4) if parts > 1 else None
    inputs = (logits, _flat(labels) if wanted.logprob else None, _bytes(mask), *_temperature(temperature))
    outputs = (
        logprob if wanted.logprob else None,
        entropy if wanted.entropy else None,
        self_certainty if wanted.self_certainty else None,
        logsumexp,
        states,
    )
    number_of_labels = labels.shape[-1] if labels is not None else 0
    block_k = min(64, power_of_2(number_of_labels))
    addressing = (number_of_labels, *_rows(logits))
    launch(
        kernels.forward_kernel,
        (rows, parts),
        logits,
        *inputs,
        *outputs,
        vocab,
        part,
        *addressing,
        STEPS=tile.steps,
        LANES=tile.lanes,
        BLOCK_K=block_k,
        num_warps=tile.num_warps,
    )
    if states is not None:
        launch(
            kernels.merge_kernel,
            (rows,),
            logits,
            *inputs,
            *outputs,
            vocab,
            parts,
            *addressing,
            PARTS=power_of_2(parts),
            BLOCK_K=block_k,
            num_warps=1,
        )
    return logprob, entropy, self_certainty, logsumexp


def backward(
    out: Tensor,  # (..., V), may be `logits` itself
    grad_logprob: Tensor | None,  # (..., K)
    grad_entropy: Tensor | None,  # (...)
    grad_self_certainty: Tensor | None,  # (...)
    logits: Tensor,  # (..., V)
    labels: Tensor | None,  # (..., K)
    mask: Tensor | None,
    temperature: float | Tensor,
    logsumexp: Tensor,  # (...)
    entropy: Tensor | None,  # (...), needed with grad_entropy
) -> None:
    """Write the gradient of the logits into `out`."""
    rows, vocab = logsumexp.numel(), logits.shape[-1]
    if rows == 0:
        return
    from mgrpo_kernels.ops.token_stats import _triton_kernels as kernels

    if _strides(logits) is None:
        logits = logits.contiguous()
    target = out if _strides(out) is not None else torch.empty_like(out, memory_format=torch.contiguous_format)
    if labels is None:
        grad_logprob = None
    number_of_labels = labels.shape[-1] if labels is not None else 0
    tile = row_tile(vocab, logits.element_size(), *tuning.of(logits.device).stats_backward)
    parts, part = parts_of_row(rows, vocab, tile, logits.device)
    launch(
        kernels.backward_kernel, (rows, parts), logits,
        logits, target, _flat(labels), _bytes(mask), *_temperature(temperature),
        _flat(grad_logprob), _flat(grad_entropy), _flat(grad_self_certainty), _flat(logsumexp),
        None if grad_entropy is None else _flat(entropy),
        vocab, part, number_of_labels, *_rows(logits), *_rows(target),
        STEPS=tile.steps, LANES=tile.lanes, BLOCK_K=min(64, power_of_2(number_of_labels)), num_warps=tile.num_warps,
    )  # fmt: skip
    if target is not out:
        out.copy_(target)


def _strides(values: Tensor) -> tuple[int, int, int] | None:
    """Return (inner, outer stride, inner stride): row i starts at (i // inner) outer + (i % inner) inner.

    That covers every contiguous tensor and slices such as ``logits[:, :-1]``. None: the rows cannot be reached so.
    """
    if values.shape[-1] > 1 and values.stride(-1) != 1:
        return None
    folded: list[
        tuple[int, int]
    ] = []  # (size, stride) of the leading dimensions, neighbours folded where memory allows
    for size, stride in zip(values.shape[:-1], values.stride()[:-1], strict=True):
        if size == 1:
            continue
        if folded and folded[-1][1] == size * stride:
            folded[-1] = (folded[-1][0] * size, stride)
        else:
            folded.append((size, stride))
    if len(folded) > 2:
        return None
    (_, outer), (inner, stride) = [(1, 0)] * (2 - len(folded)) + folded
    return inner, outer, stride


def _rows(values: Tensor) -> tuple[int, int, int]:
    strides = _strides(values)
    assert strides is not None
    return strides


def _flat(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.reshape(-1).contiguous()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape(-1).contiguous().view(torch.uint8)


def _temperature(temperature: float | Tensor) -> tuple[Any, float]:
    """Return the pointer to each row's temperature, or None, and what is divided by it: in float32, as the kernels compute."""
    return (_flat(temperature.float()), 1.0) if isinstance(temperature, Tensor) else (None, 1.0 / temperature)
