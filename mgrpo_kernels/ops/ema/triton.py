"""Triton for GPUs: all tensors of a device in one launch, whatever their dtypes; in two, where some are not aligned."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels.backend import triton_unsupported as unsupported
from mgrpo_kernels.ops._triton import tuning
from mgrpo_kernels.ops._triton.launch import launch
from mgrpo_kernels.ops.ema.specs import Batch

__all__ = ["unsupported", "update_"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # as the kernel numbers them


def update_(batch: Batch) -> None:
    """Update every ``batch.ema`` and write every ``batch.emit``.

    That is one launch, or two where some tensors are not aligned to 16 bytes: those get a launch of their own, whose loads are narrow.
    """
    aligned: list[int] = []
    unaligned: list[int] = []
    for i, tensors in enumerate(zip(batch.ema, batch.params, batch.emit or batch.ema, strict=True)):
        (aligned if all(tensor.data_ptr() % 16 == 0 for tensor in tensors) else unaligned).append(i)
    for members in (aligned, unaligned):
        if members:
            _launch(batch, members, aligned=members is aligned)


def _launch(batch: Batch, members: list[int], *, aligned: bool) -> None:
    """Update the tensors at these positions of the batch in one launch."""
    from mgrpo_kernels.ops.ema import _triton_kernels as kernels

    like = batch.ema[members[0]]
    chunk, block, num_warps = tuning.of(like.device).ema
    numbers = {dtype: number for number, dtype in enumerate(_DTYPES)}
    rows, chunks, seen = [], [], 0
    first_chunk = 0
    for i in members:
        ema, param, emit = batch.ema[i], batch.params[i], batch.emit[i] if batch.emit else None
        combination = numbers[ema.dtype] + 4 * numbers[param.dtype]
        combination += 0 if emit is None else 16 * (1 + numbers[emit.dtype])
        places = (ema.data_ptr(), param.data_ptr(), 0 if emit is None else emit.data_ptr())
        keys = batch.keys[i] if batch.keys else (0, 0)
        rows.append((*places, ema.numel(), combination, first_chunk, *keys, *batch.spans[i]))
        chunks.append(-(-ema.numel() // chunk))
        first_chunk += chunks[-1]
        seen |= 1 << combination
    tensor_of_chunk = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(torch.tensor(chunks))
    launch(
        kernels.update_kernel,
        (first_chunk,),
        like,
        _on_device(torch.tensor(rows, dtype=torch.int64), like),
        _on_device(tensor_of_chunk, like),
        batch.decay,
        SEEN=seen,
        STOCHASTIC=bool(batch.keys),
        ALIGNED=aligned,
        CHUNK=chunk,
        BLOCK=block,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )


def _on_device(table: Tensor, like: Tensor) -> Tensor:
    """Copy a table to the device without waiting for it: from pinned memory, which PyTorch keeps until the copy is done."""
    return table.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else table
