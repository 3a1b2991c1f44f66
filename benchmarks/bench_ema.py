"""The momentum update. Bytes an element: EMA read and written (4 + 4), parameter read (2), copy written (2)."""

import pytest
import torch
from harness import DEVICE, GPU, assert_close, measure

from mgrpo_kernels import ema_update_

TENSORS, SIZE = (400, 2**22) if GPU else (60, 2**20)
DECAY = 0.99


def ours(ema, params, emit):
    ema_update_(ema, params, DECAY, emit=emit)


def foreach_lerp(ema, params, emit):
    """The fastest that plain PyTorch offers, with the casts that mixed dtypes need."""
    torch._foreach_lerp_(ema, [param.float() for param in params], 1 - DECAY)
    torch._foreach_copy_(emit, ema)


def eager(ema, params, emit):
    for average, param, copy in zip(ema, params, emit, strict=True):
        average.mul_(DECAY).add_(param, alpha=1 - DECAY)
        copy.copy_(average)


PROVIDERS = {"ours": ours, "foreach_lerp": foreach_lerp, "eager": eager}


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_ema(benchmark, provider):
    torch.manual_seed(0)
    params = [torch.randn(SIZE, device=DEVICE).bfloat16() for _ in range(TENSORS)]
    ema = [torch.randn(SIZE, device=DEVICE) for _ in range(TENSORS)]
    emit = [torch.empty_like(param) for param in params]
    function = PROVIDERS[provider]
    mine, theirs = [ema[0].clone()], [ema[0].clone()]
    function(mine, params[:1], emit[:1])
    foreach_lerp(theirs, params[:1], [emit[0].clone()])
    assert_close(mine[0], theirs[0], 1e-6)
    measure(
        benchmark, lambda: function(ema, params, emit), ceiling=lambda: foreach_lerp(ema, params, emit), ceiling_name="foreach_lerp",
        bytes=12 * TENSORS * SIZE,
    )  # fmt: skip
