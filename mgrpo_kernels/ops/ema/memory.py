"""How the tensors of a momentum update may share memory: tied ones, and the same one in several lists, but nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels.sharded import is_dtensor

WRITTEN = ("ema", "emit")


def local_of(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def first_of_tied(lists: Mapping[str, list[Tensor]]) -> list[int]:
    """Return for each position the first one with the same EMA, which is itself for a tensor that is not tied.

    Raises:
        ValueError: a tensor that is written to shares memory in another way: with itself, with one of another position, or with one of
            its own position that begins elsewhere or has other strides. Tensors with gaps in memory are compared only with themselves.
    """
    local = {name: [local_of(tensor) for tensor in tensors] for name, tensors in lists.items()}
    seen: dict[tuple[Any, ...], int] = {}
    first = [seen.setdefault(_place(ema), i) if ema.numel() else i for i, ema in enumerate(local["ema"])]
    for i, j in enumerate(first):
        if i != j and _place(local["params"][i]) != _place(local["params"][j]):
            raise ValueError(f"ema[{i}]: expected a tensor of its own, got ema[{j}] again with another parameter")
    for name in WRITTEN:
        for i, tensor in enumerate(local.get(name, ())):
            if tensor.numel() > 1 and torch._debug_has_internal_overlap(tensor) == 1:
                raise ValueError(
                    f"{name}[{i}]: expected memory that does not overlap itself, got strides {tensor.stride()}"
                )
    _check_apart(local, first)
    return first


def _place(local: Tensor) -> tuple[Any, ...]:
    return local.data_ptr(), tuple(local.shape), local.stride(), local.dtype


def _check_apart(local: Mapping[str, list[Tensor]], first: list[int]) -> None:
    """Raise ValueError if memory that is written belongs to two tensors, unless these are one place of one pair, or of tied ones."""
    open_ones: list[tuple[int, str, int]] = []  # end, list and position of what may reach into the next memory
    for start, end, name, i in sorted(_extents(local)):
        open_ones = [each for each in open_ones if each[0] > start]
        for _, other, j in open_ones:
            written = sorted([(name, i), (other, j)], key=lambda each: each[0] not in WRITTEN)
            if written[0][0] not in WRITTEN:
                continue
            if first[i] != first[j] or _place(local[name][i]) != _place(local[other][j]):
                one, two = (f"{which}[{position}]" for which, position in written)
                raise ValueError(f"{one}: expected memory of its own, got memory that is shared with {two}")
        open_ones.append((end, name, i))


def _extents(local: Mapping[str, list[Tensor]]) -> list[tuple[int, int, str, int]]:
    """Return begin and end of the memory of each tensor that has any and fills it without gaps, its list and its position there."""
    return [
        (start, start + tensor.nbytes, name, i)
        for name, tensors in local.items()
        for i, tensor in enumerate(tensors)
        if (start := tensor.data_ptr()) and (tensor.is_contiguous() or _has_no_gaps(tensor))
    ]


def _has_no_gaps(tensor: Tensor) -> bool:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return last + 1 == tensor.numel()
