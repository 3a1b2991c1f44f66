"""TRL's chunked log-probs, computed by :func:`linear_token_stats`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels import backends, linear_token_stats
from mgrpo_kernels.integrations import Patch

NAME = "_ChunkedLogProbFunction"
_WITHOUT_GRADIENT = ("log_sum_sq_probs", "mean_logits", "is_top1")  # what TRL's supervised trainers ask for besides
_EVERY_OUTPUT = ("entropy", *_WITHOUT_GRADIENT)


class FusedHead:
    """In place of TRL's autograd function of the same call: ``.apply(...)`` -> five outputs, None where not asked for."""

    def __init__(self, patch: Patch, own: Any) -> None:
        self._patch = patch
        self._own = own

    def apply(
        self,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = _EVERY_OUTPUT,
    ) -> tuple[Tensor | None, ...]:
        """Return log-prob, entropy and three None, ``(N,)`` float32 each; `chunk_size` is for TRL's own code alone."""
        reason = unsupported(hidden, weight, outputs)
        if reason is not None:
            self._patch.fall_back(NAME, reason)
            plain: tuple[Tensor | None, ...] = self._own.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
            return plain
        # As TRL: outside autocast the head's parameters are cast to the hidden states' dtype.
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        stats = linear_token_stats(
            hidden,
            weight,
            targets,
            bias=bias,
            stats=("logprob", "entropy") if "entropy" in outputs else ("logprob",),
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=final_logit_softcapping,
        )
        return stats.logprob, stats.entropy, None, None, None


def unsupported(hidden: Tensor, weight: Tensor, outputs: Sequence[str]) -> str | None:
    """Return why the fused head cannot do what TRL asks for, or None."""
    more = [name for name in outputs if name in _WITHOUT_GRADIENT]
    if more:
        return f"the fused head has no {', '.join(more)}"
    if hasattr(weight, "ds_id"):
        return "DeepSpeed ZeRO-3 takes the head's weight away between forward and backward"
    dtype = compute_dtype(hidden)
    ready = backends(hidden.device, dtype)["linear_token_stats"]
    if all(state != "ok" for name, state in ready.items() if name != "reference"):
        why = "; ".join(f"{name}: {state}" for name, state in ready.items() if name != "reference")
        return f"no kernel runs {dtype} on {hidden.device.type} ({why})"
    return None


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return what the head computes in: the autocast dtype, where one is in force."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def scores_labels_alone(own: Callable[[torch.device], bool]) -> Callable[[torch.device], bool]:
    """Return what decides whether TRL picks out the labelled tokens before the head: it does on a CPU too.

    TRL scores every position on a device without Triton, for the sake of compilers of fixed shapes, which a CPU does not have.
    """

    def _use_triton(device: torch.device) -> bool:
        return device.type == "cpu" or own(device)

    return _use_triton
