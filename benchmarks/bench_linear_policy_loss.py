"""From hidden states to the policy loss. FLOP: 2 N V H a matmul, 3 of them fused or with the logits held, up to 4 composed.

The ceiling and the shares are those of bench_linear_token_stats.py. A provider that forms the gradient in the forward pass has
nothing to do in backward but to hand it over.
"""

import pytest
from harness import (
    HEADS,
    SEQUENCES,
    TOKENS,
    TOLERANCE,
    available,
    beside,
    check_against,
    dtype_of,
    head_inputs,
    loss_inputs,
    loss_truth,
    room_for,
    rows,
)
from timing import measure

OP = "linear_policy_loss"


def time_it(benchmark, shape, dtype, provider, step, tokens, patient=False):
    peer, width, vocab = available(OP, provider), *HEADS[shape]
    if provider in ("eager", "compile"):
        room_for(
            f"{provider} at {tokens} tokens", tokens * vocab * 14
        )  # the logits, and three float32 tensors of their shape
    hidden, weight, labels = head_inputs(shape, dtype_of(dtype), tokens)
    old, advantages = loss_inputs(shape, hidden.dtype, tokens)
    truth = loss_truth(shape, hidden.dtype, tokens)
    leaves = hidden.detach().view(SEQUENCES, -1, width), weight.detach()
    if step != "forward":
        leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    labels = labels.view(SEQUENCES, -1)
    gemms = peer.matmuls(hidden, vocab, step)

    def call(function):
        return lambda: function(*leaves, labels, old, advantages)

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
        patient=patient,
        gradient_bytes=0 if step == "forward" else (hidden.numel() + weight.numel()) * hidden.element_size(),
    )


@pytest.mark.parametrize(("shape", "dtype", "provider", "step"), rows(OP))
def bench_linear_policy_loss(benchmark, shape, dtype, provider, step):
    time_it(benchmark, shape, dtype, provider, step, TOKENS)
