"""The IQR filter: kilobytes, so the cost is launches. Bytes: an entropy read and a flag written, 5 each. Ceiling: one copy."""

import pytest
import torch
from harness import available, beside, simple_rows
from peers import eager_filter
from timing import DEVICE, measure

PROMPTS, GROUP = 512, 32


@pytest.mark.parametrize("provider", simple_rows("iqr_filter"))
def bench_iqr_filter(benchmark, provider):
    peer = available("iqr_filter", provider)
    torch.manual_seed(0)
    entropy = torch.rand(PROMPTS * GROUP, device=DEVICE)

    def check(outputs, grads):
        assert torch.equal(outputs[0], eager_filter(entropy, GROUP)), "keep is not the reference's: no time is taken"

    def call(function):
        return lambda: (function(entropy, GROUP),)

    measure(
        benchmark,
        "forward",
        call(peer.function),
        provider=provider,
        ours=beside("iqr_filter", peer, call),
        check=check,
        ceiling=entropy.clone,
        ceiling_name="copy",
        bytes=5 * entropy.numel(),
        computes=peer.computes,
    )
