"""Fingerprints of what a run began with: its data, its base model and its tokenizer. A checkpoint holds them, and --resume compares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mgrpo_kernels.train import parallel
from mgrpo_kernels.train.data.task import Example, Task
from mgrpo_kernels.train.errors import UsageError

NAMES = {
    "data": "training prompts",
    "eval_data": "held-out prompts",
    "model": "weights of the base model",
    "tokenizer": "tokenizer",
}


def of_task(task: Task) -> dict[str, str]:
    """Return the fingerprints of the prompts, as the model gets them, and of their true answers."""
    return {"data": of_examples(task.train), "eval_data": of_examples(task.held_out)}


def of_examples(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for each in examples:
        digest.update(json.dumps(each).encode() + b"\n")
    return f"{len(examples)} prompts, sha256 {digest.hexdigest()[:16]}"


def of_tokenizer(tokenizer: Any) -> str:
    """Return the fingerprint of a tokenizer: how it splits, its vocabulary, its special tokens and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = None
    if backend is not None:  # what a call sets on it is left out
        rules = {
            name: each for name, each in json.loads(backend.to_str()).items() if name not in ("truncation", "padding")
        }
    parts = [rules, sorted(tokenizer.get_vocab().items()), str(tokenizer.special_tokens_map), tokenizer.chat_template]
    return f"sha256 {hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]}"


def of_model(model: nn.Module) -> str:
    """Return the fingerprint of a model's weights, without those of an adapter. It is taken before any of them has trained."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            digest.update(f"{name.replace('.base_layer', '')} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"sha256 {digest.hexdigest()[:16]}"


def compare(before: Mapping[str, str], now: Mapping[str, str], *, allowed: bool) -> list[str]:
    """Return the differences from what the run began with, a line each, where they are allowed. What `before` lacks is not compared.

    Raises:
        UsageError: there are some, and they are not allowed.
    """
    changed = [
        f"{NAMES[name]} ({before[name]} -> {value})" for name, value in now.items() if before.get(name, value) != value
    ]
    if changed and not allowed:
        raise UsageError(
            f"resume: expected the data, model and tokenizer that the run began with, got other {' and '.join(changed)}: restore them, "
            "or accept the change with --allow-changed-data"
        )
    return [f"changed: {each}" for each in changed]


def agree(now: Mapping[str, str]) -> None:
    """Raise UsageError on all ranks if one of them reads other data, or another model or tokenizer, than the first."""
    everyone = parallel.all_gather(dict(now))
    with parallel.together():
        for number, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    raise UsageError(
                        f"rank {number}: expected the {NAMES[name]} of rank 0 ({value}), got other ones ({theirs.get(name)}): all machines "
                        "need the same files"
                    )
