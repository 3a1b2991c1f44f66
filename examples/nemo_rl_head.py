"""Compute the log-probs of next tokens directly from hidden states, as the patched Megatron head of NeMo-RL does.

    python examples/nemo_rl_head.py                          # on one process
    torchrun --nproc-per-node 2 examples/nemo_rl_head.py     # on two processes

If NeMo-RL 0.7 is installed, patched() replaces NeMo-RL's function by this one. The example calls the function as NeMo-RL's
GPTModel does, so it needs neither NeMo-RL nor Megatron.
"""

import os
import tempfile

import torch
import torch.distributed as dist

from mgrpo_kernels.integrations import IntegrationError
from mgrpo_kernels.integrations.nemo_rl import from_parallel_hidden_states_to_logprobs, patched

if "RANK" in os.environ:  # torchrun
    dist.init_process_group("gloo")
else:
    folder = tempfile.TemporaryDirectory()
    dist.init_process_group("gloo", init_method=f"file://{folder.name}/store", rank=0, world_size=1)
rank, ranks = dist.get_rank(), dist.get_world_size()

try:
    patched().undo()
    print("NeMo-RL is installed: call patched() in each training process, and keep the handle")
except IntegrationError as error:
    print(error)

length, batch, width, vocabulary = 32, 3, 64, 5000
generator = torch.Generator().manual_seed(0)
hidden = torch.randn(length, batch, width, generator=generator)  # (L, B, H)
weight = torch.randn(vocabulary, width, generator=generator) * 0.2
tokens = torch.randint(0, vocabulary, (batch, length), generator=generator)

mine = hidden.chunk(ranks)[rank].clone().requires_grad_()  # this rank's part of the sequence
shard = weight.chunk(ranks)[rank].clone().requires_grad_()  # this rank's part of the vocabulary
start = rank * len(shard)
logprob = from_parallel_hidden_states_to_logprobs(
    mine, shard, False, tokens, vocab_start_index=start, vocab_end_index=start + len(shard), tp_group=dist.group.WORLD
)
(-logprob.mean()).backward()
truth = torch.log_softmax(hidden @ weight.T, -1)[:-1].gather(-1, tokens.t()[1:].unsqueeze(-1)).squeeze(-1).t()
torch.testing.assert_close(logprob, truth, rtol=1e-4, atol=1e-4)
if rank == 0:
    print(
        f"{ranks} rank(s): log-prob {logprob.mean():.6f} of {tuple(logprob.shape)}, gradient of hidden {mine.grad.norm():.6f}"
    )
dist.destroy_process_group()
