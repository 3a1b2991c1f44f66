"""Triton for GPUs: all tensors of a device in one launch, whatever their dtypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mgrpo_kernels.backend import triton_unsupported as unsupported
from mgrpo_kernels.ops._triton import tuning
from mgrpo_kernels.ops._triton.launch import launch
from mgrpo_kernels.ops.ema.specs import Batch

__all__ = ["unsupported", "update_"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # as the kernel numbers them


def update_(batch: Batch) -> None:
    """Update every ``batch.ema`` and write every ``batch.emit``."""
    from mgrpo_kernels.ops.ema import _triton_kernels as kernels

    emits: Sequence[Tensor | None] = batch.emit or [None] * len(batch.ema)
    chunk, block, num_warps = tuning.of(batch.ema[0].device).ema
    numbers = {dtype: number for number, dtype in enumerate(_DTYPES)}
    rows, chunks, seen, addresses = [], [], 0, 0
    first_chunk = 0
    for i, (ema, param, emit) in enumerate(zip(batch.ema, batch.params, emits, strict=True)):
        combination = numbers[ema.dtype] + 4 * numbers[param.dtype]
        combination += 0 if emit is None else 16 * (1 + numbers[emit.dtype])
        places = (ema.data_ptr(), param.data_ptr(), 0 if emit is None else emit.data_ptr())
        keys = batch.keys[i] if batch.keys else (0, 0)
        rows.append((*places, ema.numel(), combination, first_chunk, *keys, *batch.spans[i]))
        chunks.append(-(-ema.numel() // chunk))
        first_chunk += chunks[-1]
        seen |= 1 << combination
        addresses |= places[0] | places[1] | places[2]
    tensor_of_chunk = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(torch.tensor(chunks))
    like = batch.ema[0]
    launch(
        kernels.update_kernel, (first_chunk,), like,
        _on_device(torch.tensor(rows, dtype=torch.int64), like), _on_device(tensor_of_chunk, like), batch.decay,
        SEEN=seen, STOCHASTIC=bool(batch.keys), ALIGNED=addresses % 16 == 0, CHUNK=chunk, BLOCK=block, num_warps=num_warps,
        enable_fp_fusion=False,
    )  # fmt: skip


def _on_device(table: Tensor, like: Tensor) -> Tensor:
    """Copy a table to the device without waiting for it: from pinned memory, which PyTorch keeps until the copy is done."""
    return table.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else table
