"""The fused head. FLOP: 2 N V H a matmul; forward has one, backward two, and one more for the share of the logits that it computes again.

The ceiling is the bare ``hidden @ weight.T`` of the same shape and dtype. `ratio` is in units of it, whatever the provider does;
`share_of_ceiling` is the provider's own number of matmuls over that.
"""

import pytest
from harness import (
    HEADS,
    TOKENS,
    TOLERANCE,
    available,
    beside,
    check_against,
    dtype_of,
    head_inputs,
    room_for,
    rows,
    stats_truth,
)
from timing import GPU, measure

OP = "linear_token_stats"


def time_it(benchmark, shape, dtype, provider, step, tokens, patient=False):
    peer, width, vocab = available(OP, provider), *HEADS[shape]
    if provider.startswith(("eager", "compile")):
        room_for(
            f"{provider} at {tokens} tokens", tokens * vocab * 18
        )  # the logits, and four float32 tensors of their shape
    hidden, weight, labels = head_inputs(shape, dtype_of(dtype), tokens)
    truth = stats_truth(shape, hidden.dtype, tokens, peer.computes)
    leaves = hidden.detach(), weight.detach()
    if step != "forward":
        leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    gemms = peer.matmuls(hidden, vocab, step)

    def call(function):
        return lambda: function(*leaves, labels)

    measure(
        benchmark,
        step,
        call(peer.function),
        leaves,
        truth.upstream,
        provider=provider,
        ours=beside(OP, peer, call),
        check=check_against(truth, TOLERANCE[hidden.dtype]),
        ceiling=lambda: hidden @ weight.t(),
        ceiling_name="matmul",
        ceilings=gemms,
        gemms=gemms,
        flops=2.0 * tokens * width * vocab * gemms,
        computes=peer.computes,
        tokens=tokens,
        patient=patient or (peer.slow_on_cpu and not GPU),
        gradient_bytes=0 if step == "forward" else (hidden.numel() + weight.numel()) * hidden.element_size(),
    )


@pytest.mark.parametrize(("shape", "dtype", "provider", "step"), rows(OP))
def bench_linear_token_stats(benchmark, shape, dtype, provider, step):
    time_it(benchmark, shape, dtype, provider, step, TOKENS)
