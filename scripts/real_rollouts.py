"""Hidden states, head and tokens of a real language model's own responses, for benchmarks of the head.

    python scripts/real_rollouts.py        writes build/real_rollouts.pt

The model is SmolLM2-135M-Instruct, see real_model.py. It answers a few word problems at the temperatures 1 and 0.6.
"""

from __future__ import annotations

from pathlib import Path

import torch
from real_model import real_model

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "real_rollouts.pt"
TEMPERATURES = (1.0, 0.6)
TOKENS = 512
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
def main() -> None:
    """Write hidden states ``(N, H)`` and tokens ``(N,)`` for each temperature, and the head's weight ``(V, H)``, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = real_model()
    tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    chats = [[{"role": "user", "content": problem}] for problem in PROBLEMS]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    given = tokenizer(texts, return_tensors="pt", padding=True)
    length, width = TOKENS // len(PROBLEMS), given.input_ids.shape[1]
    found = {}
    for temperature in TEMPERATURES:
        torch.manual_seed(0)
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
        hidden = model.get_decoder()(tokens, attention_mask=mask).last_hidden_state
        found[temperature] = hidden[:, width - 1 : -1].flatten(0, 1).clone(), tokens[:, width:].flatten().clone()
    OUT.parent.mkdir(exist_ok=True)
    weight = model.get_output_embeddings().weight.detach().clone()
    torch.save({"weight": weight, "rollouts": found}, OUT)
    print(f"{OUT.relative_to(ROOT)}: {TOKENS} tokens at each of the temperatures {TEMPERATURES}")
    for temperature, (hidden, labels) in found.items():
        needed = entries_needed(hidden, weight, labels, temperature)
        share, beyond = needed.mean() / len(weight), (needed > min(4096, len(weight) // 12)).float().mean()
        print(
            f"temperature {temperature}: 2^-8 needs {share:.2%} of the vocabulary, more than is kept in {beyond:.0%} of the rows"
        )


def entries_needed(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return for each row ``(N,)`` the fewest entries that hold all but 2^-8 of the log-prob's absolute logit gradient."""
    grad = torch.softmax(hidden @ weight.t() / temperature, -1)
    grad[range(len(labels)), labels] -= 1.0
    magnitudes = grad.abs().sort(-1, descending=True).values
    return 1.0 + (magnitudes.cumsum(-1) < (1 - 2.0**-8) * magnitudes.sum(-1, keepdim=True)).sum(-1)


if __name__ == "__main__":
    main()
