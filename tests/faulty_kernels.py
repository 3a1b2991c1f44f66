"""Kernels with the faults that tests/compiled_sweep.py is there to find, and one without: tests/test_compile_sweep.py expects them."""

import torch
import triton
import triton.language as tl


@triton.jit
def sound_kernel(x, mask, stride):
    row = tl.program_id(0)
    if mask is not None and tl.load(mask + row) == 0:
        return
    tl.store(x + row * tl.cast(stride, tl.int64), 0.0)


@triton.jit
def stride_of_1_kernel(x, stride):
    tl.store(x + tl.program_id(0) * stride.to(tl.int64), 0.0)


@triton.jit
def many_rows_kernel(x, rows):
    total = 0
    for _ in range(4):
        total += rows
    tl.store(x + total, 0.0)


@triton.jit
def absent_mask_kernel(x, mask):
    tl.store(x, 0.0, mask=tl.load(mask) != 0)


@triton.jit
def mask_never_absent_kernel(x, mask):
    if mask is not None:
        tl.store(x, 0.0, mask=tl.load(mask) != 0)


def _call(kernel, **args):
    return "torch.float32", "a launch", kernel, {"x": torch.zeros(64)} | args, {"num_warps": 1}


MASK = torch.ones(64, dtype=torch.uint8)
CALLS = [
    _call(sound_kernel, mask=MASK, stride=7),
    _call(sound_kernel, mask=None, stride=7),
    _call(stride_of_1_kernel, stride=7),
    _call(many_rows_kernel, rows=7),
    _call(absent_mask_kernel, mask=None),
    _call(mask_never_absent_kernel, mask=MASK),
]
