"""Compare OpenRLHF's actor without and with the fused head: the log-probs and entropies agree, and the logits are not held.

    python examples/openrlhf_actor.py               # with a small random model
    python examples/openrlhf_actor.py --model DIR   # with your own model

A training run of OpenRLHF has many processes; docs/integrations/openrlhf.md describes how each of them calls patched().
"""

import argparse

import torch
from openrlhf.models.actor import Actor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mgrpo_kernels.integrations.openrlhf import patched

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="directory or Hugging Face Hub name (default: a small random model)")
args = parser.parse_args()

torch.manual_seed(0)
if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model)
else:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=5000, num_hidden_layers=2, **sizes))
actor = Actor(model, temperature=0.8)
actor.packing_samples = False

tokens = torch.randint(0, model.config.vocab_size, (4, 48))
attention, actions = torch.ones_like(tokens), torch.ones(4, 32)
found = {}
for name in ("plain", "patched"):
    handle = patched(strict=True) if name == "patched" else None
    log_prob, output = actor(tokens, actions, attention, return_output=True, return_entropy=True)
    if handle is not None:
        handle.undo()
    held = "none" if output.logits is None else f"{output.logits.numel() * 4 / 2**20:.1f} MiB in float32"
    print(f"{name:8} log-prob {log_prob.mean():.6f}  entropy {output.entropy.mean():.6f}  logits: {held}")
    found[name] = log_prob.detach(), output.entropy.detach()
for plain, mine in zip(*found.values(), strict=True):
    torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
