"""The fused head. FLOP: 2 N V H a matmul; forward has one, backward three (one of them the logits again)."""

import pytest
import torch
from harness import GPU, HEADS, HERE, ROUNDS, TOKENS, assert_close, dtype_of, head_inputs, measure, need

from mgrpo_kernels import linear_token_stats


def ours(hidden, weight, labels):
    stats = linear_token_stats(hidden, weight, labels)
    return stats.logprob, stats.entropy


def eager(hidden, weight, labels):
    logp = torch.log_softmax((hidden @ weight.t()).float(), -1)
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def trl(hidden, weight, labels):
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits = hidden @ weight.t()
    return selective_log_softmax(logits, labels), entropy_from_logits(logits)


PROVIDERS = {"ours": ours, "eager": eager, "compile": torch.compile(eager), "trl": trl}


@pytest.mark.parametrize("shape", HERE)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("step", ["forward", "both"])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_linear_token_stats(benchmark, shape, dtype, step, provider):
    if provider == "trl":
        need("trl")
        if step == "both":
            pytest.skip("TRL's entropy is detached: it has no backward")
    if GPU and dtype == "float32":
        pytest.skip("nobody trains a float32 head on a GPU")
    hidden, weight, labels = head_inputs(shape, dtype_of(dtype))
    function = PROVIDERS[provider]
    with torch.no_grad():
        for got, want in zip(
            function(hidden[:32], weight, labels[:32]),
            eager(hidden[:32].float(), weight.float(), labels[:32]),
            strict=True,
        ):
            assert_close(got, want, 1e-4 if dtype == "float32" else 3e-2)
    hidden.requires_grad_(step == "both")
    weight.requires_grad_(step == "both")

    def forward():
        with torch.no_grad():
            function(hidden, weight, labels)

    def both():
        logprob, entropy = function(hidden, weight, labels)
        torch.autograd.grad(logprob.sum() + entropy.sum(), (hidden, weight))

    gemms = 1 if step == "forward" else 4 if provider == "ours" else 3
    width, vocab = HEADS[shape]
    measure(
        benchmark, forward if step == "forward" else both, ceiling=lambda: hidden.detach() @ weight.detach().t(),
        ceiling_name="matmul", rounds=ROUNDS, gemms=gemms, flops=2.0 * TOKENS * width * vocab * gemms,
        gradient_bytes=0 if step == "forward" else (hidden.numel() + weight.numel()) * hidden.element_size(),
    )  # fmt: skip
