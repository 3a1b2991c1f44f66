"""Train a small model that answers word problems in the right form, and mostly wrongly, to try a whole run with it.

    python examples/small_model.py train.jsonl --output small
    python -m mgrpo_kernels.train --model small --data train.jsonl --eval-data test.jsonl --max-response-tokens 12 --output runs/small

The tokenizer is a byte-pair tokenizer trained on the file, and the model has four layers of width 128. It is trained on questions
whose answer is in a ``\\boxed{}``. This takes two minutes on two cores.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mgrpo_kernels import extract_answer
from mgrpo_kernels.train.config import DataConfig
from mgrpo_kernels.train.data.files import read_rows

PAD, EOS = "<pad>", "<eos>"


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-pair tokenizer trained on these texts, in which every digit is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[PAD, EOS], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def main() -> None:
    """Train the model, and save it with its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="FILE", help="JSONL file whose lines have a question and an answer")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to write the model to")
    parser.add_argument(
        "--steps",
        type=int,
        default=300,
        metavar="N",
        help="number of supervised steps, with 16 questions each (default: 300)",
    )
    parser.add_argument(
        "--vocabulary", type=int, default=2048, metavar="N", help="size of the vocabulary (default: 2048)"
    )
    given = parser.parse_args()

    rows = [row.values for row in read_rows(str(given.data), "data")]
    template = DataConfig().prompt_template
    pairs = [
        (template.replace("{question}", row["question"]), f"\\boxed{{{extract_answer(row['answer'])}}}{EOS}")
        for row in rows
    ]
    tokenizer = make_tokenizer([text for pair in pairs for text in pair], given.vocabulary)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=1e-3), random.Random(0)
    for step in range(1, given.steps + 1):
        questions, answers = (
            list(tokenizer(list(texts))["input_ids"])
            for texts in zip(*draw.sample(pairs, min(16, len(pairs))), strict=True)
        )
        width = max(len(a) + len(b) for a, b in zip(questions, answers, strict=True))
        ids = torch.tensor([a + b + [0] * (width - len(a) - len(b)) for a, b in zip(questions, answers, strict=True)])
        labels = torch.tensor(
            [[-100] * len(a) + b + [-100] * (width - len(a) - len(b)) for a, b in zip(questions, answers, strict=True)]
        )
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == given.steps:
            print(f"step {step} of {given.steps}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)
    print(f"written: {given.output}, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
