"""How kernels are launched, and how their programs are cut. Importing this module needs no triton."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels.ops._triton import tuning


def launch(
    kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, enable_fp_fusion: bool = True, **options: Any
) -> None:
    """Run `kernel` over `grid` on the device of `like`.

    `enable_fp_fusion` is always passed, because Triton 3.10 changes its default. True saves the row kernels an
    instruction for every element; False is for those whose results must have the reference's bits.
    """
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[grid](*args, enable_fp_fusion=enable_fp_fusion, **options)


class RowTile(NamedTuple):
    """What a program holds of a row at once: `steps` x `lanes` elements, a lane never leaving its thread."""

    steps: int
    lanes: int
    num_warps: int

    @property
    def elements(self) -> int:
        """Elements in the tile."""
        return self.steps * self.lanes


def row_tile(columns: int, element_size: int, threads: int, steps: int) -> RowTile:
    """Return the tile for rows of `columns`: `steps` 16-byte loads by `threads` each, fewer where a row is short."""
    vector = 16 // element_size
    lanes = max(32 * vector, min(threads * vector, power_of_2(columns)))
    steps = max(1, min(steps, power_of_2(columns) // lanes))
    warp = 64 if torch.version.hip else 32
    return RowTile(steps, lanes, max(1, lanes // (warp * vector)))


def power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is at least `number`, and at least 1."""
    return 1 << max(0, number - 1).bit_length()


def parts_of_row(rows: int, columns: int, tile: RowTile, device: torch.device) -> tuple[int, int]:
    """Return (parts, columns of a part): programs share a row where the rows are too few to fill the device."""
    tiles = -(-columns // tile.elements)
    wanted = max(1, min(tiles, tuning.of(device).programs_per_processor * processors(device) // max(1, rows)))
    part = -(-tiles // wanted) * tile.elements
    return -(-columns // part), part


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors; one on a CPU, for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
