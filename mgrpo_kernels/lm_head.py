"""Statistics from a transformers model without its logits."""

from __future__ import annotations

import inspect
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
    return LmHead(head.weight, head.bias, logit_scale(config), softcap(config))


def logit_scale(config: Any) -> float:
    """Return what a model of this (text) configuration multiplies its logits by, before any soft cap."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse, Falcon-H1
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    if getattr(config, "logits_mup_width_multiplier", None) is not None:  # Inkling divides the hidden states
        return 1.0 / float(config.logits_mup_width_multiplier)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / scaling  # Granite and MiniCPM3 divide


def softcap(config: Any) -> float | None:
    """Return the soft cap of the logits of a model of this (text) configuration, or None."""
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):  # Gemma, RecurrentGemma, xLSTM
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    return None


def decoder_of(model: Any, *others: Any) -> Any:
    """Return the module of a transformers causal language model that computes its hidden states.

    Args:
        model: causal language model.
        others: modules to prefer to what the model calls its decoder.

    Raises:
        TypeError: there is no such module.
    """
    # Llama 4 returns itself from get_decoder() and as base_model, and ModernBERT its head from get_decoder().
    for found in (*others, model.get_decoder(), model.base_model, getattr(model, "model", None)):
        if found is not None and found is not model and not isinstance(found, nn.Linear):
            return found
    raise TypeError(f"model: expected one with a decoder below its head, got {type(model).__name__}")


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
        TypeError: the model has no linear head, or is a wrapper around one; a temperature that is neither a number nor a floating tensor.
        ValueError: no such statistic, a temperature that is not above 0, a model that does not run on token ids alone or whose forward
            another library has replaced, or a head that does more to its logits than this function knows of.
    """
    check_stats(stats)
    if hasattr(model, "get_base_model"):
        raise TypeError(
            f"model: expected the model itself, fuse_lm_head(model.get_base_model()), got {type(model).__name__}"
        )
    head = lm_head(model)
    before = vars(model).get("forward")
    if not isinstance(before, FusedForward | None):
        raise ValueError(
            "model: expected one with its class's own forward, got one whose forward another library has replaced: "
            "fuse the model before that library wraps it, or load it without a device_map over several devices"
        )
    shape = temperature.shape if isinstance(temperature, Tensor) else ()
    _, per_token = checks.check_temperature(temperature, shape, head.weight.device)
    checks.check_temperature_values(per_token)
    _check(model)
    model.forward = FusedForward(model, temperature, tuple(stats))
    return model


class FusedForward:
    """The forward method of a model whose head is fused. Copies and pickles of the model have one of their own.

    Args:
        model: the model, which refers to this object as its ``forward``.
        temperature: as in :func:`fuse_lm_head`.
        stats: likewise.
    """

    def __init__(self, model: Any, temperature: float | Tensor, stats: Sequence[str]) -> None:
        self.model, self.temperature, self.stats = model, temperature, stats

    @property
    def __signature__(self) -> inspect.Signature:
        """What ``generate`` reads: which arguments it may pass, and that logits of the last position are enough."""
        return inspect.signature(self._own)

    @property
    def _own(self) -> Any:
        return type(self.model).forward.__get__(self.model)

    def __call__(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """Return statistics of `labels`, or without them what the class's own forward returns."""
        if labels is None:
            return self._own(*args, **kwargs)
        checks.check_tensor("labels", labels, dtypes=checks.INTS)  # before the decoder takes its time
        head = lm_head(self.model)
        kwargs.setdefault("use_cache", False)  # the statistics of a whole sequence need no cache
        returned = decoder_of(self.model, self.model.base_model)(*args, **kwargs)
        hidden = returned[0] if isinstance(returned, tuple) else returned.last_hidden_state  # return_dict=False
        checks.check_tensor("labels", labels, dtypes=checks.INTS, shape=hidden.shape[:-1], device=hidden.device)
        return linear_token_stats(
            hidden,
            head.weight,
            labels,
            bias=head.bias,
            stats=self.stats,
            temperature=self.temperature,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            mask=labels != IGNORED,
        )


CHECKED_TOKENS = 8
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 5e-3, torch.bfloat16: 0.02}
"""Largest difference of log-probs that rounding explains, for logits of at most 1; it grows with the largest logit."""


def _check(model: Any) -> None:
    """Raise ValueError unless the fused head's log-probs are those of the model's own logits.

    They are compared at a few positions, for the least and the most likely token and one more.
    """
    head = lm_head(model)
    tokens = torch.arange(CHECKED_TOKENS, device=head.weight.device).unsqueeze(0) % head.weight.shape[0]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            own = type(model).forward(model, input_ids=tokens, use_cache=False).logits[0].float()  # (L, V)
            hidden = decoder_of(model, model.base_model)(input_ids=tokens, use_cache=False).last_hidden_state
            labels = torch.stack([own.argmin(-1), own.argmax(-1), tokens[0]])  # (3, L)
            mine = linear_token_stats(
                hidden.expand(3, -1, -1),
                head.weight,
                labels,
                bias=head.bias,
                stats=("logprob",),
                logit_scale=head.logit_scale,
                softcap=head.softcap,
            ).logprob
    except Exception as error:  # a model may raise any error for a keyword that it does not know
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"model: expected a transformers causal language model that runs on token ids alone and whose head takes its decoder's last "
            f"hidden states, got {type(model).__name__}: {type(error).__name__}: {reason}"
        ) from error
    finally:
        model.train(training)
    assert mine is not None
    worst = (mine.float() - own.log_softmax(-1).gather(-1, labels.T).T).abs().max().item()
    if not worst <= TOLERANCE[head.weight.dtype] * max(1.0, own.abs().max().item()):
        raise ValueError(
            f"model: expected a head that is weight, bias, logit scale and soft cap alone, got {type(model).__name__}, whose log-probs "
            f"differ by {worst:.2g}"
        )


__all__ = ["LmHead", "TokenStats", "fuse_lm_head", "lm_head"]
