"""Times the fused head with 16-bit operands beside bare matmuls: ``python benchmarks/narrow_head.py [--tokens N] [--dtype float16]``.

For CPUs without 16-bit instructions, which these two variables make of any x86 CPU with AVX2:
``ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=1``. Each round calls everything once; ratios are medians over rounds.
"""

import argparse
import time

import torch

from mgrpo_kernels import linear_policy_loss, linear_token_stats
from mgrpo_kernels.ops.linear_token_stats import tiled

ALL_LOGITS = 2**30  # bytes of workspace in which all logits are stored, at the sizes that are timed


def calls(tokens, width, vocab, dtype):
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

    def both(operands, workspace_bytes=None):
        leaves = [each.detach().requires_grad_() for each in operands]
        stats = linear_token_stats(*leaves, labels, workspace_bytes=workspace_bytes)
        torch.autograd.grad((stats.logprob, stats.entropy), leaves, (upstream, upstream))

    def loss(operands):
        leaves = [each.detach().requires_grad_() for each in operands]
        value = linear_policy_loss(leaves[0].view(8, -1, width), leaves[1], labels.view(8, -1), old, advantages).loss
        torch.autograd.grad(value, leaves)

    return {
        "matmul": lambda: torch.mm(hidden, weight.t(), out=narrow_logits),
        "matmul, float32": lambda: torch.mm(wide[0], wide[1].t(), out=logits),
        "forward": lambda: forward((hidden, weight)),
        "forward, float32": lambda: forward(wide),
        "forward + backward": lambda: both((hidden, weight)),
        "forward + backward, stored": lambda: both((hidden, weight), ALL_LOGITS),
        "forward + backward, float32": lambda: both(wide),
        "  the same, stored": lambda: both(wide, ALL_LOGITS),
        "loss, forward + backward": lambda: loss((hidden, weight)),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="number of tokens, a multiple of 8")
    parser.add_argument("--width", type=int, default=896, help="hidden width")
    parser.add_argument("--vocab", type=int, default=32768, help="size of the vocabulary")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="dtype of the operands")
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    timed = calls(options.tokens, options.width, options.vocab, dtype)
    seconds = {name: [] for name in timed}
    for _ in range(options.rounds + 1):
        for name, call in timed.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    narrow = tiled.multiplies_16_bits(torch.device("cpu"), dtype)
    print(
        f"{options.dtype}, {options.tokens} tokens, H = {options.width}, V = {options.vocab}; 16-bit matmul with float32 sums: {narrow}"
    )
    ratio = {name: torch.tensor(found[1:]) for name, found in seconds.items()}
    for name, found in ratio.items():
        against = [(found / ratio[base]).median().item() for base in ("matmul", "matmul, float32")]
        print(
            f"{name:28} {1e3 * found.median().item():9.1f} ms   {against[0]:6.3f} matmul   {against[1]:6.3f} float32 matmul"
        )


if __name__ == "__main__":
    main()
