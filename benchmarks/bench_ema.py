"""The momentum update. Bytes an element: EMA read and written (4 + 4), parameter read (2), copy written (2). Ceiling: a copy.

On a GPU over the parameters of Qwen2.5-7B, on a CPU over a list of tensors.
"""

import pytest
import torch
from harness import assert_close, available, beside, copy_of, room_for, simple_rows
from timing import DEVICE, GPU, SMALL, measure, size

DECAY = 0.99


def parameter_shapes():
    if SMALL or not GPU:
        return [(size(2**20, 1000),)] * size(60, 3)
    width, kv, inner, vocab, layers = 3584, 512, 18944, 152064, 28
    attention = [(width, width), (width,), (kv, width), (kv,), (kv, width), (kv,), (width, width)]
    layer = [*attention, (inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [(vocab, width), *layer * layers, (width,), (vocab, width)]


@pytest.mark.parametrize("provider", simple_rows("ema"))
def bench_ema(benchmark, provider):
    peer = available("ema", provider)
    shapes = parameter_shapes()
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    room_for(f"an EMA of {elements / 1e9:.1f} billion parameters", 8 * elements + 2**32)
    torch.manual_seed(0)
    params = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for shape in shapes]
    ema = [torch.randn(shape, device=DEVICE) for shape in shapes]
    emit = [torch.empty_like(param) for param in params]
    before = [each.clone() for each in ema[-3:]]

    def check(outputs, grads):
        for average, param, copy, old in zip(ema[-3:], params[-3:], emit[-3:], before, strict=True):
            want = old.double() * DECAY + (1 - DECAY) * param.double()
            assert_close(average, want, 1e-6, "ema")
            assert_close(copy, want, 3e-3, "copy")

    def reset():
        for average, old in zip(ema[-3:], before, strict=True):
            average.copy_(old)

    def call(function):
        def forward():
            function(ema, params, emit, DECAY)
            return ()

        return forward

    measure(
        benchmark,
        "forward",
        call(peer.function),
        provider=provider,
        ours=beside("ema", peer, call),
        check=check,
        reset=reset,
        ceiling=copy_of(12 * elements),
        ceiling_name="copy",
        bytes=12 * elements,
        computes=peer.computes,
    )
