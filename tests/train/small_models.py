"""Small models with tokenizers of their own, written to a directory as transformers reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


def write_model(place: Path, vocabulary: int, *, eos: int | None, context: int) -> None:
    """Write a random model of 2 layers of width 32."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
    )
    Qwen2ForCausalLM(config).save_pretrained(place)


def make_byte_model(
    place: Path, *, eos: bool = True, context: int = 2048, ends_prompts: bool = False, **tokenizer_options: Any
) -> None:
    """Write a model whose tokens are bytes. Its tokenizer has no token for padding. `ends_prompts`: it puts <end> behind every text."""
    names = ["<end>", "<turn>", "<begin>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(names)}, merges=[]))
    tokenizer.add_special_tokens(names[:3])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if ends_prompts or "bos_token" in tokenizer_options:
        single = f"{'<begin> ' if 'bos_token' in tokenizer_options else ''}$A{' <end>' if ends_prompts else ''}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<end>", 0), ("<begin>", 2)]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>" if eos else None, **tokenizer_options
    )
    wrapped.save_pretrained(place)
    write_model(place, len(names), eos=0 if eos else None, context=context)


def make_answering_model(place: Path) -> None:
    """Write a random model that, as it has few other words, mostly answers, by 0 to 3. All but digits up to 3 is unknown to it."""
    words = ["_", "?", "$", *"0123", *(f"#### {digit}\n" for digit in "0123")]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"#### [0-3]\n|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="_", unk_token="?", eos_token="$")
    wrapped.save_pretrained(place)
    write_model(place, len(words), eos=2, context=256)
