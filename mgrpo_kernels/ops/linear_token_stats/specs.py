"""What the fused head's op and its backends share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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


class Entries(NamedTuple):
    """The largest final logits of each row, kept between the forward and the backward pass, and sums over all others.

    Place 0 is the label's, with the id -1 where the label is not in this part of the vocabulary. Places 1 to count - 1 hold others.
    """

    ids: Tensor  # (N, room) int32, of the weight's rows
    logits: Tensor  # (N, room) float32
    counts: Tensor  # (N,) int32
    rest: Tensor  # (4, N) float32: MAX, SUM_EXP, SUM_EXPZ of what is not kept, as in a row's state, and the bound that a kept logit exceeds

    @classmethod
    def empty(cls, number: int, room: int, device: torch.device) -> Entries:
        """Return the entries of rows of which nothing has been seen. With no room, all four are empty."""
        number = number if room else 0
        rest = torch.zeros(4, number, device=device, dtype=torch.float32)
        rest[0] = rest[3] = -torch.inf
        ids = torch.zeros(number, room, dtype=torch.int32, device=device)
        ids[:, :1] = -1
        counts = torch.ones(number, dtype=torch.int32, device=device)
        return cls(ids, torch.zeros_like(ids, dtype=torch.float32), counts, rest)

    @property
    def room(self) -> int:
        """For how many entries of a row there is room."""
        return self.ids.shape[1]

    def of_rows(self, rows: slice) -> Entries:
        """Return those of some rows, as views."""
        return Entries(self.ids[rows], self.logits[rows], self.counts[rows], self.rest[:, rows])


def transform(x: Tensor, head: Head, temperature: float | Tensor) -> Tensor:
    """Return final logits z from raw ones x ``(n, C)``, in x's dtype: the definition. `temperature` float or ``(n,)``."""
    y = x * head.logit_scale
    if head.softcap is not None:
        y = head.softcap * torch.tanh(y / head.softcap)
    return y / _beside(x, temperature)


def transform_gradient(grad_z: Tensor, x: Tensor, head: Head, temperature: float | Tensor) -> Tensor:
    """Return dx from dz, both ``(n, C)``; d softcap tanh(y / softcap) / dy = 1 - tanh(y / softcap)^2."""
    grad = grad_z / _beside(x, temperature)
    if head.softcap is not None:
        grad = grad * (1 - torch.tanh(x * head.logit_scale / head.softcap).square())
    return grad * head.logit_scale


def _beside(x: Tensor, temperature: float | Tensor) -> float | Tensor:
    """Return a temperature as a divisor of x ``(n, C)``, whose dtype the quotient has."""
    return temperature.to(x.dtype).unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
