"""Memory beyond inputs and gradients at N = 4096 tokens: ``python benchmarks/peak_memory.py``. Minutes on a CPU."""

import torch
from harness import head_inputs
from timing import peak_memory

from mgrpo_kernels import linear_policy_loss, linear_token_stats

MIB = 2**20
TOKENS, SEQUENCES = 4096, 8


def main() -> None:
    """Print a line for each dtype and pass."""
    for dtype in (torch.bfloat16, torch.float32):
        hidden, weight, labels = head_inputs("qwen2.5-0.5b", dtype, TOKENS)
        hidden.requires_grad_(), weight.requires_grad_()
        gradients = (hidden.numel() + weight.numel()) * hidden.element_size()

        def forward(hidden=hidden, weight=weight, labels=labels):
            with torch.no_grad():
                linear_token_stats(hidden, weight, labels)

        def both(hidden=hidden, weight=weight, labels=labels):
            stats = linear_token_stats(hidden, weight, labels)
            torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), (hidden, weight))

        def loss(hidden=hidden, weight=weight, labels=labels):
            rows = hidden.view(SEQUENCES, -1, hidden.shape[-1])
            advantages = torch.ones(SEQUENCES, device=hidden.device)
            result = linear_policy_loss(rows, weight, labels.view(SEQUENCES, -1), None, advantages)
            torch.autograd.grad(result.loss, (hidden, weight))

        for run, made in ((forward, 0), (both, gradients), (loss, gradients)):
            # A negative figure: memory that an earlier run had given back to the allocator served this one.
            print(f"{dtype} {run.__name__}: {(peak_memory(run) - made) / MIB:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
