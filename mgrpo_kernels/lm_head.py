"""Statistics from a transformers model without its logits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mgrpo_kernels import checks
from mgrpo_kernels.ops.linear_token_stats import linear_token_stats
from mgrpo_kernels.ops.token_stats.specs import TokenStats, check_stats

IGNORED = -100  # the label that transformers leaves out


class LmHead(NamedTuple):
    """The head of a causal language model: what :func:`linear_token_stats` needs besides hidden states."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None


def lm_head(model: Any) -> LmHead:
    """Return the head of a transformers causal language model. Parameters, not copies: gradients reach them.

    Raises:
        TypeError: the model has no linear output embedding.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        what = "" if head is None else f" with a {type(head).__module__}.{type(head).__name__}"
        raise TypeError(
            f"model: expected a transformers causal language model with a linear head, got {type(model).__name__}{what}"
        )
    config = model.config.get_text_config()
    return LmHead(
        head.weight, head.bias, logit_scale(config), getattr(config, "final_logit_softcapping", None)
    )  # Gemma


def logit_scale(config: Any) -> float:
    """Return what a model of this (text) configuration multiplies its logits by, before any soft cap."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse, Falcon-H1
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / scaling  # Granite and MiniCPM3 divide


def fuse_lm_head(
    model: Any, *, temperature: float | Tensor = 1.0, stats: Sequence[str] = ("logprob", "entropy")
) -> Any:
    """Make ``model(..., labels=labels)`` return :class:`TokenStats` instead of logits and loss; return the model.

    The logits workspace is bounded as in :func:`linear_token_stats`, whatever the number of tokens.
    Without labels the model does what it did before, so ``generate`` still works.
    ``del model.forward`` takes the change back. One short forward pass checks that the fused head is the model's own.

    Args:
        model: a transformers causal language model whose head is linear (with or without bias, logit scale, soft cap).
        temperature: as in :func:`linear_token_stats`.
        stats: likewise.

    Labels are int32 or int64 ``(B, L)``, already shifted: ``labels[:, i]`` is scored by position i. -100 is masked.

    A model with a PEFT adapter is fused by its base: ``fuse_lm_head(model.get_base_model())``; an adapter on the head itself is refused.

    Raises:
        TypeError: the model has no linear head, or is a wrapper around one.
        ValueError: no such statistic, or a head that does more to its logits than this function knows of.
    """
    check_stats(stats)
    if hasattr(model, "get_base_model"):
        raise TypeError(
            f"model: expected the model itself, fuse_lm_head(model.get_base_model()), got {type(model).__name__}"
        )
    lm_head(model)
    inner = type(model).forward.__get__(model)

    @functools.wraps(
        inner
    )  # generate reads the signature: what it may pass, and that logits of the last position are enough
    def forward(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return inner(*args, **kwargs)
        checks.check_tensor("labels", labels, dtypes=checks.INTS)
        head = lm_head(model)
        hidden = model.base_model(*args, **kwargs).last_hidden_state
        return linear_token_stats(
            hidden, head.weight, labels, bias=head.bias, stats=stats, temperature=temperature, logit_scale=head.logit_scale,
            softcap=head.softcap, mask=labels != IGNORED,
        )  # fmt: skip

    _check(model)
    model.forward = forward
    return model


def _check(model: Any) -> None:
    """Raise ValueError unless the fused head's log-probs are those of the model's own logits, on two tokens."""
    head = lm_head(model)
    tokens = torch.tensor([[0, 1]], device=head.weight.device) % head.weight.shape[0]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            own = type(model).forward(model, input_ids=tokens, use_cache=False).logits.float()
            hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            mine = linear_token_stats(
                hidden,
                head.weight,
                tokens,
                bias=head.bias,
                stats=("logprob",),
                logit_scale=head.logit_scale,
                softcap=head.softcap,
            ).logprob
    finally:
        model.train(training)
    assert mine is not None
    want = own.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 0.1
    if not torch.allclose(mine.float(), want, rtol=tolerance, atol=tolerance):
        raise ValueError(
            f"model: expected a head that is weight, bias, logit scale and soft cap alone, got {type(model).__name__}, whose log-probs "
            f"differ by {(mine.float() - want).abs().max().item():.2g}"
        )


__all__ = ["LmHead", "TokenStats", "fuse_lm_head", "lm_head"]
