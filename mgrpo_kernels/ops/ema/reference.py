"""The definition, in plain PyTorch, tensor by tensor."""

from __future__ import annotations

import torch

from mgrpo_kernels.backend import reference_unsupported as unsupported
from mgrpo_kernels.ops.ema.specs import ROUNDED, Batch, compute_dtype, random_bits, round_stochastically

__all__ = ["unsupported", "update_"]


def update_(batch: Batch) -> None:
    """Update every ``batch.ema`` and write every ``batch.emit``.

    ema + (1 - decay) (param - ema), or from the other end where that is the nearer one, as torch.lerp: exact at decay 0 and 1.
    """
    for i, (ema, param) in enumerate(zip(batch.ema, batch.params, strict=True)):
        dtype = compute_dtype(ema)
        old, new = ema.to(dtype), param.to(dtype)
        decay, weight = batch.decay.to(dtype), (1.0 - batch.decay).to(dtype)
        step = new - old
        updated = torch.where(weight < 0.5, old + weight * step, new - decay * step)
        updated = torch.where(old == new, old, updated)
        if batch.keys and ema.dtype in ROUNDED:
            base, inner, stride = batch.spans[i]
            local = torch.arange(ema.numel(), device=ema.device)
            bits = random_bits(base + local // inner * stride + local % inner, batch.keys[i])
            updated = round_stochastically(updated.reshape(-1), bits, ema.dtype).view_as(ema)
        ema.copy_(updated)
        if batch.emit:
            batch.emit[i].copy_(ema)
