"""Train with GRPO using only the ops: sample, score, reward, advantage, loss, step. No (tokens, vocabulary) tensor is held.

python examples/grpo_loop.py                                # a small random model learns to generate the digit 7; seconds on a CPU
python examples/grpo_loop.py --model Qwen/Qwen2.5-0.5B-Instruct --learning-rate 1e-6 --steps 50
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from mgrpo_kernels import group_advantages, linear_policy_loss, linear_token_stats, trajectory_entropy
from mgrpo_kernels.train.data import demo

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="directory or Hugging Face Hub name (default: a small random model)")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--learning-rate", type=float, default=3e-3)
args = parser.parse_args()
P, G, R, TEMPERATURE = 4, 8, 8, 1.0  # prompts per step, rollouts per prompt, longest response

torch.manual_seed(0)
if args.model is None:
    tokenizer, model = demo.make_tokenizer(), LlamaForCausalLM(demo.model_config())
else:
    tokenizer, model = AutoTokenizer.from_pretrained(args.model), AutoModelForCausalLM.from_pretrained(args.model)
tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
# eval(): no dropout, so that sampling and loss use the same policy
model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
head = model.get_output_embeddings()
optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
prompts = [each.prompt for each in demo.make_task(0).train[: P * args.steps]]


def hidden_states(ids, seen):
    """Return the hidden states at the position before each response token, (B, R, H)."""
    return model.base_model(input_ids=ids, attention_mask=seen).last_hidden_state[:, width - 1 : -1]


for step in range(args.steps):
    batch = tokenizer(prompts[step * P : (step + 1) * P], return_tensors="pt", padding=True).to(model.device)
    width = batch.input_ids.shape[1]
    ids = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        do_sample=True,
        top_k=0,
        temperature=TEMPERATURE,
        num_return_sequences=G,
        max_new_tokens=R,
        pad_token_id=tokenizer.pad_token_id,
    )
    labels = ids[:, width:]  # (B, R)
    ended = (labels == tokenizer.eos_token_id).int().cumsum(1)
    mask = (ended - (labels == tokenizer.eos_token_id).int()) == 0  # up to and including the first end of sequence
    seen = torch.cat([batch.attention_mask.repeat_interleave(G, 0), mask.long()], 1)
    texts = [tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(labels, mask, strict=True)]
    rewards = torch.tensor([text.count("7") / max(1, len(text)) for text in texts], device=model.device)
    advantages = group_advantages(rewards, G)

    with torch.no_grad():
        old = linear_token_stats(
            hidden_states(ids, seen), head.weight, labels, bias=head.bias, temperature=TEMPERATURE, mask=mask
        )
    for _ in range(2):  # the second update is off-policy, so the clip has an effect
        found = linear_policy_loss(
            hidden_states(ids, seen),
            head.weight,
            labels,
            old.logprob,
            advantages,
            bias=head.bias,
            temperature=TEMPERATURE,
            mask=mask,
            loss_type="dapo",
        )
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
    entropy = trajectory_entropy(old.entropy, mask=mask).nanmean()
    print(f"step {step + 1:3d}  reward {rewards.mean():.3f}  loss {found.loss:+.4f}  entropy {entropy:.2f}")
