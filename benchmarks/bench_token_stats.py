"""Log-prob and entropy from logits. Bytes: the logits once forward; backward reads them and writes their gradient."""

import pytest
import torch
from harness import DEVICE, GPU, HEADS, assert_close, dtype_of, measure, need

from mgrpo_kernels import token_stats_from_logits

ROWS = 8192 if GPU else 512
SHAPES = ["qwen2.5-7b", "llama3-8b"] if GPU else ["qwen2.5-0.5b"]


def ours(logits, labels):
    stats = token_stats_from_logits(logits, labels)
    return stats.logprob, stats.entropy


def eager(logits, labels):
    logp = torch.log_softmax(logits.float(), -1)
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def trl(logits, labels):
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return selective_log_softmax(logits, labels), entropy_from_logits(logits)


PROVIDERS = {"ours": ours, "eager": eager, "compile": torch.compile(eager), "trl": trl}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", ["forward", "both"])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_token_stats(benchmark, shape, dtype, step, provider):
    if provider == "trl":
        need("trl")
        if step == "both":
            pytest.skip("TRL's entropy is detached: it has no backward")
    torch.manual_seed(0)
    vocab = HEADS[shape].vocab
    logits = (torch.randn(ROWS, vocab, device=DEVICE) * 2.5).to(dtype_of(dtype)).requires_grad_(step == "both")
    labels = torch.randint(0, vocab, (ROWS,), device=DEVICE)
    function = PROVIDERS[provider]
    with torch.no_grad():
        few = logits[:16]
        for got, want in zip(function(few, labels[:16]), eager(few.double(), labels[:16]), strict=True):
            assert_close(got, want, 2e-2 if (provider, dtype) == ("trl", "bfloat16") else 1e-4)

    def forward():
        with torch.no_grad():
            function(logits, labels)

    def both():
        logprob, entropy = function(logits, labels)
        torch.autograd.grad(logprob.sum() + entropy.sum(), logits)

    once = logits.numel() * logits.element_size()
    measure(
        benchmark, forward if step == "forward" else both, ceiling=lambda: logits.detach().sum(), ceiling_name="sum",
        bytes=once if step == "forward" else 3 * once,
    )  # fmt: skip
