"""What the fused head's op and its backends share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MIN_WORKSPACE = 64 * 1024


class Head(NamedTuple):
    """A language-model head, or one rank's shard of it, with everything between hidden state and final logits z.

    x = hidden @ weight.T + bias;  y = logit_scale x;  y = softcap tanh(y / softcap) if softcap;  z = y / temperature.
    """

    weight: Tensor  # (V, H), this rank's rows
    bias: Tensor | None  # (V,)
    temperature: float | Tensor  # or (N,) float32
    logit_scale: float
    softcap: float | None
    vocab_start: int  # vocabulary entry of the weight's first row
    workspace_bytes: int | None  # None: the backend's own choice
    logits_dtype: torch.dtype = torch.float32  # of raw logits in the workspace, where hidden and weight have 16 bits

    @property
    def raw_dtype(self) -> torch.dtype:
        """The dtype in which raw logits are kept: `logits_dtype` with 16-bit operands, else that of the operands."""
        return self.logits_dtype if self.weight.element_size() == 2 else self.weight.dtype


def transform(x: Tensor, head: Head, temperature: float | Tensor) -> Tensor:
    """Return final logits z from raw ones x ``(n, C)``, in x's dtype: the definition. `temperature` float or ``(n,)``."""
    y = x * head.logit_scale
    if head.softcap is not None:
        y = head.softcap * torch.tanh(y / head.softcap)
    return y / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)


def transform_gradient(grad_z: Tensor, x: Tensor, head: Head, temperature: float | Tensor) -> Tensor:
    """Return dx from dz, both ``(n, C)``; d softcap tanh(y / softcap) / dy = 1 - tanh(y / softcap)^2."""
    grad = grad_z / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)
    if head.softcap is not None:
        grad = grad * (1 - torch.tanh(x * head.logit_scale / head.softcap).square())
    return grad * head.logit_scale
