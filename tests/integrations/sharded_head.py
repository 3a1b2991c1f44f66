"""Run on two ranks: a model sharded by FSDP2, scored by TRL's own head and by ours."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from mgrpo_kernels.integrations.trl import patched
from mgrpo_kernels.train.ending import leave


def score(model, tokens):
    found = model(input_ids=tokens, labels=tokens, fused_lm_head=True)
    (found.log_probs.sum() + found.entropy.square().sum()).backward()
    weight = model.get_output_embeddings().weight
    gradient, weight.grad = weight.grad.full_tensor(), None
    return found.log_probs.detach(), found.entropy.detach(), gradient


dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model.model, mesh=mesh)
fully_shard(model, mesh=mesh, reshard_after_forward=False)
assert isinstance(model.lm_head.weight, DTensor)
torch.manual_seed(dist.get_rank())
tokens = torch.randint(2, 15, (2, 6))
want = score(model, tokens)
with patched(strict=True):
    got = score(model, tokens)
for mine, theirs in zip(got, want, strict=True):
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
print("the same")
dist.destroy_process_group()
leave(0)
