"""Entropy, self-certainty and log-probs of TRL's completions, under the model as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import pad

from mgrpo_kernels import linear_token_stats
from mgrpo_kernels.lm_head import lm_head


def completion_stats(
    trainer: Any, rows: Sequence[tuple[list[int], list[int]]], width: int, names: Sequence[str]
) -> dict[str, Tensor]:
    """Return the statistics `names` of each completion's tokens by name, ``(B, width)``; behind its end they mean nothing.

    Args:
        trainer: a GRPOTrainer.
        rows: B pairs of prompt and completion, token ids each.
        width: at least the length of the longest completion.
        names: of "entropy", "self_certainty" and "logprob".
    """
    device, padding = trainer.accelerator.device, trainer._tokenizer.pad_token_id
    left = [torch.tensor(prompt, device=device) for prompt, _ in rows]
    right = [torch.tensor(ids + [padding] * (width - len(ids)), device=device) for _, ids in rows]
    before = pad([torch.ones_like(ids) for ids in left], padding_value=0, padding_side="left")
    lengths = torch.tensor([len(ids) for _, ids in rows], device=device)
    after = (torch.arange(width, device=device) < lengths[:, None]).to(before.dtype)  # (B, width)
    tokens = torch.cat([pad(left, padding_value=padding, padding_side="left"), torch.stack(right)], 1)
    seen, batch = torch.cat([before, after], 1), trainer.args.per_device_train_batch_size
    if list(names) == ["entropy"]:
        arguments = (trainer.model, tokens, seen, width, batch)
        return {"entropy": trainer._get_per_token_logps_and_entropies(*arguments, compute_entropy=True)[1]}
    parts = [
        head_stats(trainer, tokens[i : i + batch], seen[i : i + batch], width, names)
        for i in range(0, len(rows), batch)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def head_stats(trainer: Any, tokens: Tensor, seen: Tensor, width: int, names: Sequence[str]) -> dict[str, Tensor]:
    """Return statistics that TRL has no code for, from the hidden states: ``(B, width)`` each."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = lm_head(model)
    with trainer.accelerator.autocast():
        hidden = model.base_model(input_ids=tokens, attention_mask=seen, use_cache=False).last_hidden_state
        stats = linear_token_stats(
            hidden[:, -width - 1 : -1],
            head.weight.to(hidden.dtype),
            tokens[:, -width:] if "logprob" in names else None,
            bias=None if head.bias is None else head.bias.to(hidden.dtype),
            stats=tuple(names),
            temperature=trainer.temperature,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            mask=seen[:, -width:].bool(),
        )
    return {name: getattr(stats, name) for name in names}
