"""Stand-ins for the tiny models and the data that TRL's tests load from the hub, for a machine without one.

A model has the architecture of its name, random weights, a tokenizer, and the chat template that the installed TRL has for its family.
The data are written by the script of the checkout that publishes them. Models with images have no stand-in: their tests fail to
load, with and without the patch.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from tokenizers import AddedToken
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

OWNER = "trl-internal-testing"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PAIRS = ("object_ref", "box", "quad", "vision")
SPECIAL = (
    "<|endoftext|>",
    *("<|im_start|>", "<|im_end|>"),
    *(f"<|{name}_{side}|>" for name in PAIRS for side in ("start", "end")),
    *(f"<|{name}_pad|>" for name in ("vision", "image", "video")),
)
MARKUP = (
    *("<tool_call>", "</tool_call>"),
    *(f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")),
    *("<tool_response>", "</tool_response>", "<think>", "</think>"),
)
"""Qwen's added tokens, in the order of their ids. The second ones are ordinary text."""
TEMPLATES = {
    "qwen2": "qwen2_5",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
    "gpt_oss": "gptoss",
    "llama": "llama3",
    "cohere2": "cohere2",
}
"""TRL's file of the chat template, by model type; others take Qwen's."""
FULL = ("Qwen3MoeForCausalLM",)
"""The architectures to which tests pass Qwen's own token ids, for calls of tools. Others have few tokens, so that sampling is quick."""
FEW, ROWS = 1000, {False: 1024, True: 151936}
"""Number of the vocabulary's first entries that the others have, and rows of the embedding by whether the vocabulary is full."""
LARGEST = {
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 8,
}


def make_datasets(checkout: Path, place: Path) -> None:
    """Write each configuration of the text data, by the checkout's own script, to ``place/zen/CONFIGURATION``."""

    def save(self: datasets.DatasetDict, repo_id: str, config_name: str, **_: Any) -> None:
        self.save_to_disk(str(place / repo_id.partition("/")[2] / config_name))

    script = checkout / "scripts" / "generate_zen_dataset.py"
    spec = importlib.util.spec_from_file_location("generate_zen_dataset", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    own, datasets.DatasetDict.push_to_hub = datasets.DatasetDict.push_to_hub, save
    try:
        module.main(test_size=0.1, push_to_hub=True, repo_id=f"{OWNER}/zen")
    finally:
        datasets.DatasetDict.push_to_hub = own


def tokenizer_for(model_type: str, vocabulary: Path, full: bool) -> PreTrainedTokenizerFast:
    """Return Qwen's tokenizer, or one of the first entries of its vocabulary, with the chat template of this family."""
    with tempfile.NamedTemporaryFile("w", suffix=".tiktoken") as part:
        part.writelines(vocabulary.read_text(encoding="utf-8").splitlines(keepends=True)[: None if full else FEW])
        part.flush()
        inner = TikTokenConverter(vocab_file=part.name, pattern=PATTERN).converted()
    inner.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    inner.add_tokens([AddedToken(text, special=False) for text in MARKUP])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=SPECIAL[0], bos_token=SPECIAL[0], eos_token=SPECIAL[2], model_max_length=4096
    )
    assert not full or tokenizer.convert_tokens_to_ids(["<|im_end|>", "<tool_call>"]) == [151645, 151657], vocabulary
    template = Path(trl.__file__).parent / "chat_templates" / f"{TEMPLATES.get(model_type, 'qwen2_5')}.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def make_model(name: str, place: Path, vocabulary: Path) -> None:
    """Write the model of a name such as ``tiny-Qwen2ForCausalLM-2.5``, if it is one of text, to ``place/NAME``."""
    found = re.fullmatch(r"tiny-(\w+For(?:CausalLM|SequenceClassification))(?:-[\w.]+)?", name)
    architecture: type[PreTrainedModel] | None = getattr(transformers, found[1], None) if found else None
    if architecture is None or architecture.config_class is None:
        return
    kind, full = architecture.config_class.model_type, architecture.__name__ in FULL
    tokenizer = tokenizer_for(kind, vocabulary, full)
    config = AutoConfig.for_model(kind)
    for key, value in LARGEST.items():
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, value)
    sizes = {key: value for key, value in config.to_dict().items() if key in LARGEST}
    config = AutoConfig.for_model(
        kind,
        **sizes,
        vocab_size=ROWS[full],
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    torch.manual_seed(0)
    model = architecture(config).to(torch.bfloat16)
    model.save_pretrained(place / name)
    tokenizer.save_pretrained(place / name)


def make_all(checkout: Path, place: Path, vocabulary: Path) -> None:
    """Write a stand-in for each name in the checkout's tests."""
    make_datasets(checkout, place)
    tests = "".join(path.read_text(encoding="utf-8") for path in (checkout / "tests").glob("*.py"))
    for name in sorted(set(re.findall(rf"{OWNER}/(tiny-[\w.-]+)", tests))):
        try:
            make_model(name, place, vocabulary)
        except (ValueError, TypeError, AttributeError, KeyError) as error:  # a size that this family wants otherwise
            print(f"no stand-in for {name}: {type(error).__name__}: {error}", file=sys.stderr)
