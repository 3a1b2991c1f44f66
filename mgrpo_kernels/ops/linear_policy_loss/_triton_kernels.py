"""The kernel of the three-matmul loss: its gradients, formed in the forward pass, times that of the loss."""

import triton
import triton.language as tl

from mgrpo_kernels.ops._triton.kernels import narrow


@triton.jit
def scale_kernel(x, factor, numel, BLOCK: tl.constexpr):
    """Multiply x in place by a 0-d float32 factor. A factor of 1, which only the device knows, costs no traffic."""
    by = tl.load(factor)
    if by == 1.0:
        return
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, tl.num_programs(0).to(tl.int64) * BLOCK):
        i = first + tl.arange(0, BLOCK)
        values = tl.load(x + i, mask=i < numel, other=0.0).to(tl.float32)
        tl.store(x + i, narrow(values * by, x.dtype.element_ty), mask=i < numel)
