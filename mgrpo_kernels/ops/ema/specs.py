"""What the momentum update's backends share: the shard's place in the whole tensor, and the random bits of stochastic rounding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDED = (torch.bfloat16, torch.float16)  # dtypes that stochastic rounding applies to
_MASK = 0xFFFFFFFF


class Span(NamedTuple):
    """Where the elements of a contiguous (local) tensor lie in the whole one, row-major.

    Local element i is global element ``base + (i // inner) * stride + i % inner``.
    """

    base: int
    inner: int
    stride: int


class Batch(NamedTuple):
    """Tensors of one device, all contiguous, none empty, pairwise of one shape."""

    ema: list[Tensor]
    params: list[Tensor]
    emit: list[Tensor]  # as many, or none at all
    decay: Tensor  # 0-d float64, on the device
    keys: list[tuple[int, int]]  # of each tensor's random bits; empty without stochastic rounding
    spans: list[Span]


def compute_dtype(ema: Tensor) -> torch.dtype:
    """Float64 for a float64 EMA, else float32."""
    return torch.float64 if ema.dtype == torch.float64 else torch.float32


def key(seed: int, tensor_index: int) -> tuple[int, int]:
    """Return the two 32-bit keys of a tensor: two rounds of SplitMix64 (Steele et al., 2014) over seed and index."""
    state = (seed ^ (tensor_index * 0x9E3779B97F4A7C15)) & 0xFFFFFFFFFFFFFFFF
    for _ in range(2):
        state = (state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & _MASK, state >> 32


def mix(h: Tensor) -> Tensor:
    """Scramble 32-bit numbers held in int64: the definition that kernels repeat in uint32 arithmetic ("lowbias32", C. Wellons)."""
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & _MASK
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & _MASK
    return h ^ (h >> 16)


def random_bits(index: Tensor, keys: tuple[int, int]) -> Tensor:
    """Return 32 random bits (int64) for each global element index (int64): the definition."""
    low, high = index & _MASK, index >> 32
    return mix(mix(low ^ keys[0]) ^ keys[1] ^ high)


def round_stochastically(values: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 `values` to `dtype`, up with probability equal to the fraction lost: the definition. Representable ones stay.

    Adding random bits below the last bit kept carries into it just that often. float16 below 2^-14 has a fixed quantum, 2^-24.
    """
    raw = values.view(torch.int32).long() & _MASK
    kept = 16 if dtype == torch.bfloat16 else 13  # mantissa bits to drop
    low = (1 << kept) - 1
    carried = (raw + (bits & low)) & _MASK & ~low
    carried = torch.where(carried >= 1 << 31, carried - (1 << 32), carried)
    rounded = carried.to(torch.int32).view(torch.float32)
    if dtype == torch.float16:
        units = (values.abs() * 2.0**24 + (bits & low).float() * 2.0**-13).floor()
        rounded = torch.where(values.abs() < 2.0**-14, torch.copysign(units * 2.0**-24, values), rounded)
    return torch.where(values.isfinite(), rounded, values).to(dtype)
