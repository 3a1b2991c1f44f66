"""Heads whose vocabulary lies on two ranks, as verl and NeMo-RL call them. Its processes import neither of the two."""

import tempfile
from functools import cache

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mgrpo_kernels.integrations import nemo_rl, verl

WORLD = 2


def inputs(batch, length, hidden=24, vocab=130, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(length, batch, hidden, generator=generator)  # (L, B, H), as Megatron has it
    w = torch.randn(vocab, hidden, generator=generator) * 0.4
    return (
        h,
        w,
        torch.randint(0, vocab, (batch, length), generator=generator),
        torch.randn(2, batch, length, generator=generator),
    )


def verl_head(rank, group):
    h, w, labels, weights = inputs(1, 21)
    part = w.chunk(WORLD)[rank].clone().requires_grad_()
    h = h.requires_grad_()
    logprob, entropy = verl.linear_cross_entropy(h, part, labels, 0.9, "none", group)
    (logprob * weights[0] + entropy * weights[1]).sum().backward()
    return logprob.detach(), entropy.detach(), h.grad, part.grad


def nemo_head(rank, group):
    h, w, tokens, weights = inputs(3, 12)
    part = w.chunk(WORLD)[rank].clone().requires_grad_()
    h = h.chunk(WORLD)[rank].clone().requires_grad_()
    start = rank * len(part)
    logprob = nemo_rl.from_parallel_hidden_states_to_logprobs(
        h, part, False, tokens, vocab_start_index=start, vocab_end_index=start + len(part), tp_group=group, chunk_size=5
    )
    (logprob * weights[0, :, 1:]).sum().backward()
    return logprob.detach(), h.grad, part.grad


def _rank(rank, path, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
    results[rank] = {head.__name__: head(rank, dist.group.WORLD) for head in (verl_head, nemo_head)}
    dist.destroy_process_group()


@cache
def results():
    """Return what each rank gets of each head, by its name. The processes start once for all tests."""
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(_rank, (f"{folder}/store", found), nprocs=WORLD)
        return [found[rank] for rank in range(WORLD)]
