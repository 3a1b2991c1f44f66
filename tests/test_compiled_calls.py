"""Random valid calls of every op, compiled whole: what runs Python beside the kernels must be traceable for every dtype and option."""

import random

import fuzz_ops
import pytest
import torch

CALLS = 6
KERNELS = (fuzz_ops.linear, fuzz_ops.decoder)  # not ops: they run where nothing is traced
OPS = [maker for maker in dict.fromkeys(fuzz_ops.MAKERS) if maker not in KERNELS]


def tensors(result):
    results = [result] if isinstance(result, torch.Tensor) else result or ()
    return [each for each in results if isinstance(each, torch.Tensor)]


@pytest.mark.parametrize("backend", fuzz_ops.BACKENDS)
@pytest.mark.parametrize("maker", OPS, ids=lambda maker: maker.__name__)
@pytest.mark.parametrize("number", range(CALLS))
def test_a_random_call_compiles_whole(maker, backend, number):
    torch.manual_seed(number)
    call = maker(random.Random(f"{number}"), backend)
    again = call.copy()
    expected = call()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *args, **keywords: call.function(*args, **keywords), fullgraph=True, backend="eager"
    )
    got = compiled(*again.args, **again.keywords)
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
