"""Make a transformers model return log-probs and entropies instead of logits.

python examples/fuse_lm_head.py                             # a small random model with a vocabulary of 50,000
python examples/fuse_lm_head.py --model Qwen/Qwen2.5-0.5B
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mgrpo_kernels import fuse_lm_head

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="directory or Hugging Face Hub name (default: a small random model)")
args = parser.parse_args()

torch.manual_seed(0)
if args.model is None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50_000, **shape))
else:
    model = AutoModelForCausalLM.from_pretrained(args.model)

tokens = torch.randint(0, model.config.get_text_config().vocab_size, (2, 256))
labels = torch.full_like(tokens, -100)
labels[:, :-1] = tokens[:, 1:]  # already shifted: position i scores labels[i]

fuse_lm_head(model, temperature=0.8)
stats = model(input_ids=tokens, labels=labels)  # logprob and entropy, (2, 256) each
(-stats.logprob.sum() - 0.01 * stats.entropy.sum()).backward()
logits = stats.logprob.numel() * model.config.get_text_config().vocab_size * 4
print(f"mean log-prob {stats.logprob[:, :-1].mean():.3f}, mean entropy {stats.entropy[:, :-1].mean():.3f} nats")
print(f"size of the logits, which were not held: {logits / 2**20:.0f} MiB, and as much for their gradient")
start = {"input_ids": tokens[:, :8], "attention_mask": torch.ones(2, 8, dtype=torch.long), "pad_token_id": 0}
print(f"generate still works: {model.generate(**start, max_new_tokens=4, do_sample=False).shape[1]} tokens")
del model.forward  # undoes the change
print(f"and without the fused head: a loss of {model(input_ids=tokens, labels=tokens).loss:.3f}")
