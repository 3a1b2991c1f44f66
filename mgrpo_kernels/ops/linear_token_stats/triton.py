"""Placeholder until the kernels land.

tiled.py holds the loop (matmul per tile, float32 sums) for native and triton alike. This backend gives it two Triton passes over a
tile, `state` and `gradient_` (tiled.Passes), and forward / backward here only call tiled.forward / tiled.backward with them.
linear_policy_loss/triton.py reuses the same passes with tiled.forward_backward.
"""

from mgrpo_kernels.backend import triton_unsupported as _base


def unsupported(device, dtype):
    return _base(device, dtype) or "not written yet"
