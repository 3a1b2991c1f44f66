"""Hidden states, head and tokens of a real language model's own responses, for benchmarks of the head.

    python scripts/real_rollouts.py        writes build/real_rollouts.pt
    python scripts/real_rollouts.py 8      counts on 8 responses to each problem, and writes no file

The model is SmolLM2-135M-Instruct, see real_model.py. It answers a few word problems at the temperatures 1, 0.6 and 0.3; the file has the
first two.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from real_model import real_model

from mgrpo_kernels.ops.linear_token_stats.staircase import stair_of

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "real_rollouts.pt"
TEMPERATURES = (1.0, 0.6)
COUNTED = (*TEMPERATURES, 0.3)
TOKENS = 512  # with one response to each problem
ROWS = 256  # at once
TOLERANCE = 2.0**-8
PROBLEMS = (
    "A baker sells 12 loaves in the morning and twice as many in the afternoon. Each costs 3 dollars. How much does she earn?",
    "Tom has 45 marbles. He gives a third of them to his sister and loses 6. How many are left?",
    "A train covers 180 miles in 3 hours. At the same speed, how far does it go in 5 hours?",
    "A class of 28 pupils shares 112 pencils equally. How many does each get, and how many would 35 pupils get?",
    "Anna reads 15 pages a day from Monday to Friday and 30 pages on each day of the weekend. How many pages in two weeks?",
    "A shirt costs 40 dollars. It is reduced by 25 percent, and then by another 5 dollars. What is its price?",
    "A tank holds 600 litres. One pump fills 20 litres a minute, another 10. How long do both take?",
    "Four friends pay 86 dollars for dinner and add a tip of 14 dollars. What does each pay?",
)


@torch.no_grad()
def main(responses: int = 1, *, write: bool = True) -> None:
    """Count for each temperature what a tolerance of 2^-8 needs.

    With `write`, write hidden states ``(N, H)`` and tokens ``(N,)``, and the head's weight ``(V, H)``, in float32.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = real_model()
    tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    chats = [[{"role": "user", "content": problem}] for problem in PROBLEMS for _ in range(responses)]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    given = tokenizer(texts, return_tensors="pt", padding=True)
    length, width = TOKENS // len(PROBLEMS), given.input_ids.shape[1]
    weight = model.get_output_embeddings().weight.detach().clone()
    found = {}
    for temperature in COUNTED:
        torch.manual_seed(0 if write else 1)  # the responses of the file, or others
        tokens = model.generate(
            **given,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            min_new_tokens=length,
            max_new_tokens=length,
        )
        mask = torch.nn.functional.pad(given.attention_mask, (0, length), value=1)
        pairs = zip(tokens.split(len(PROBLEMS)), mask.split(len(PROBLEMS)), strict=True)
        states = torch.cat([model.get_decoder()(ids, attention_mask=each).last_hidden_state for ids, each in pairs])
        hidden, labels = states[:, width - 1 : -1].flatten(0, 1).clone(), tokens[:, width:].flatten().clone()
        report(hidden, weight, labels, temperature)
        if temperature in TEMPERATURES:
            found[temperature] = hidden, labels
    if write:
        OUT.parent.mkdir(exist_ok=True)
        torch.save({"weight": weight, "rollouts": found}, OUT)
        print(f"{OUT.relative_to(ROOT)}: {TOKENS} tokens at each of the temperatures {TEMPERATURES}")


def report(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float) -> None:
    """Print how many entries the rows need, and what a backward pass multiplies that puts dense products in their place."""
    needed, least = entries_needed(hidden, weight, labels, temperature)
    number, vocab = len(needed), len(weight)
    share, beyond = needed.double().mean() / vocab, (needed > min(4096, vocab // 12)).double().mean()
    multiplied = stair_of(needed, least).products / (number * vocab)
    print(
        f"temperature {temperature}, {number} tokens: 2^-8 needs {share:.3%} of the vocabulary, more than is kept in {beyond:.1%} of the "
        f"rows; any row needs {(least <= vocab).double().mean():.1%}, and a GPU multiplies {multiplied:.1%}"
    )


def entries_needed(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each row ``(N,)`` the fewest entries that hold all but 2^-8 of the log-prob's absolute logit gradient.

    And for each column ``(V,)`` the least of these numbers of the rows that need it, V + 1 if none does.
    """
    vocab = len(weight)
    least = torch.full((vocab,), vocab + 1, dtype=torch.int32)
    needs = []
    for rows in torch.arange(len(labels)).split(ROWS):
        grad = torch.softmax(hidden[rows] @ weight.t() / temperature, -1)
        grad[range(len(rows)), labels[rows]] -= 1.0
        magnitudes, order = grad.abs().sort(-1, descending=True)
        share = magnitudes.cumsum(-1)
        need = 1 + (share < (1 - TOLERANCE) * share[:, -1:]).sum(-1, dtype=torch.int32)
        kept = torch.arange(vocab) < need.unsqueeze(-1)
        least.scatter_reduce_(0, order[kept], need.unsqueeze(-1).expand_as(order)[kept], "amin")
        needs.append(need)
    return torch.cat(needs), least


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]), write=len(sys.argv) < 2)
