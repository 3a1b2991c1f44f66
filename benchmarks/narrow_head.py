"""Times the fused head with 16-bit operands beside bare matmuls, for CPUs without 16-bit instructions.

python benchmarks/narrow_head.py [--tokens N ...] [--dtype float16] [--eager] [--out benchmarks/results/narrow-head.json]

Each round calls everything once; ratios are medians over rounds. ``ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2`` makes any x86 CPU
with AVX2 compute as one without 16-bit instructions.
"""

import argparse
import json
import os
import time
from pathlib import Path

import machine
import torch

from mgrpo_kernels import linear_policy_loss, linear_token_stats
from mgrpo_kernels.ops.linear_token_stats import tiled
from mgrpo_kernels.train.watch.report import environment


def calls(tokens, width, vocab, dtype, with_eager):
    """Return what is timed, by name."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, width).to(dtype), (0.05 * torch.randn(vocab, width)).to(dtype)
    wide = hidden.float(), weight.float()
    labels, upstream = torch.randint(0, vocab, (tokens,)), torch.randn(tokens)
    narrow_logits, logits = torch.empty(tokens, vocab, dtype=dtype), torch.empty(tokens, vocab)
    with torch.no_grad():
        old = linear_token_stats(hidden, weight, labels).logprob.view(8, -1)
    advantages = torch.randn(8)

    def forward(operands):
        with torch.no_grad():
            linear_token_stats(*operands, labels)

    def both(operands):
        leaves = [each.detach().requires_grad_() for each in operands]
        stats = linear_token_stats(*leaves, labels)
        torch.autograd.grad((stats.logprob, stats.entropy), leaves, (upstream, upstream))

    def eager():
        leaves = [each.detach().requires_grad_() for each in (hidden, weight)]
        logprobs = torch.log_softmax((leaves[0] @ leaves[1].t()).float(), -1)
        entropy, chosen = -(logprobs.exp() * logprobs).sum(-1), logprobs.gather(-1, labels[:, None])[:, 0]
        torch.autograd.grad((chosen, entropy), leaves, (upstream, upstream))

    def loss(operands):
        leaves = [each.detach().requires_grad_() for each in operands]
        value = linear_policy_loss(leaves[0].view(8, -1, width), leaves[1], labels.view(8, -1), old, advantages).loss
        torch.autograd.grad(value, leaves)

    timed = {
        "matmul": lambda: torch.mm(hidden, weight.t(), out=narrow_logits),
        "matmul, float32": lambda: torch.mm(wide[0], wide[1].t(), out=logits),
        "forward": lambda: forward((hidden, weight)),
        "forward, float32": lambda: forward(wide),
        "forward + backward": lambda: both((hidden, weight)),
        "forward + backward, float32": lambda: both(wide),
        "loss, forward + backward": lambda: loss((hidden, weight)),
    }
    return timed | ({"forward + backward, eager PyTorch": eager} if with_eager else {})


def main() -> None:
    """Time what is asked for, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 128], help="numbers of tokens, multiples of 8")
    parser.add_argument("--width", type=int, default=896, help="hidden width")
    parser.add_argument("--vocab", type=int, default=32768, help="size of the vocabulary")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="dtype of the operands")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    parser.add_argument("--eager", action="store_true", help="time plain PyTorch too, which may take a minute a call")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    options = parser.parse_args()
    dtype, load = getattr(torch, options.dtype), os.getloadavg()[0]
    cases = []
    for tokens in options.tokens:
        timed = calls(tokens, options.width, options.vocab, dtype, options.eager)
        seconds = {name: [] for name in timed}
        for _ in range(options.rounds + 1):  # the first is not counted
            for name, call in timed.items():
                begin = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - begin)
        taken = {name: torch.tensor(found[1:]) for name, found in seconds.items()}
        found = {
            name: {
                "milliseconds": 1e3 * each.median().item(),
                "matmul": (each / taken["matmul"]).median().item(),
                "float32": (each / taken["matmul, float32"]).median().item(),
            }
            for name, each in taken.items()
        }
        cases.append({"tokens": tokens, "dtype": options.dtype, "calls": found})
        print(f"{options.dtype}, {tokens} tokens, H = {options.width}, V = {options.vocab}")
        for name, of in found.items():
            print(
                f"{name:36} {of['milliseconds']:9.1f} ms   {of['matmul']:6.3f} matmul   {of['float32']:6.3f} float32 matmul"
            )
    if options.out:
        written = {
            "environment": environment(torch.device("cpu")) | machine.stamp(),
            "load_average": load,
            "matmul_of_16_bits": tiled.multiplies_16_bits(torch.device("cpu"), dtype),
            "shape": {"width": options.width, "vocab": options.vocab, "rounds": options.rounds},
            "cases": cases,
        }
        options.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
