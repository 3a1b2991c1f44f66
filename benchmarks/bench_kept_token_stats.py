"""The fused head over kept sets, beside the bare ``hidden @ weight.T`` of all logits, in units of which `ratio` is.

FLOP: 2 N K H a product, one forward and two backward. Each token keeps its K likeliest entries. Forward + backward includes the weight's
gradient, which is as large as the weight; ``hidden`` is the same with a frozen weight.
"""

import pytest
import torch
from timing import GPU, measure, size

from mgrpo_kernels import linear_token_stats

OP = "kept_token_stats"
TOKENS, WIDTH, VOCAB, KEPT = size(8192 if GPU else 512, 64), size(896, 64), size(32768, 1000), size(128, 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", ["forward", "hidden", "both"])
def bench_kept_token_stats(benchmark, dtype, step):
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if GPU else "cpu"
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(device, getattr(torch, dtype))
    weight = (torch.randn(VOCAB, WIDTH, generator=generator) * 2.5 * WIDTH**-0.5).to(hidden)
    kept = torch.cat([(rows.float() @ weight.float().t()).topk(KEPT).indices.int() for rows in hidden.split(512)])
    labels = kept[:, KEPT // 4].contiguous()
    leaves = hidden.requires_grad_(step != "forward"), weight.requires_grad_(step == "both")
    trained = tuple(each for each in leaves if each.requires_grad)

    def call():
        return linear_token_stats(*leaves, labels, kept=kept)[:2]

    def check(results, gradients):
        z = hidden.detach().double() @ weight.detach().double().t()
        logp = torch.full_like(z, -torch.inf).scatter(1, kept.long(), z.gather(1, kept.long())).log_softmax(-1)
        truth = logp.gather(1, labels.long().unsqueeze(1)).squeeze(1), torch.special.entr(logp.exp()).sum(-1)
        for got, want in zip(results, truth, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)

    gemms = {"forward": 1, "hidden": 2, "both": 3}[step]
    upstream = tuple(torch.ones(TOKENS, device=device) for _ in range(2))
    measure(
        benchmark,
        "forward" if step == "forward" else "both",
        call,
        trained or leaves,
        upstream,
        provider="ours",
        check=check,
        ceiling=lambda: hidden.detach() @ weight.detach().t(),
        ceiling_name="matmul",
        ceilings=1,
        gemms=gemms,
        ours=None,
        computes="logprob, entropy",
        flops=2.0 * TOKENS * KEPT * WIDTH * gemms,
        tokens=TOKENS,
    )
