"""C++ for CPU: one pass over the logits forward, one read and one write backward. csrc/cpu/token_stats*.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels.backend import native_unsupported as unsupported
from mgrpo_kernels.ops._statistics import Wanted

__all__ = ["backward", "forward", "unsupported"]


def forward(
    logits: Tensor,  # (..., V)
    labels: Tensor | None,  # (..., K)
    mask: Tensor | None,  # (...)
    temperature: float | Tensor,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logprob ``(..., K)``, entropy, self_certainty, logsumexp ``(...)``; those not wanted are empty."""
    per_row, number = (temperature, 1.0) if isinstance(temperature, Tensor) else (None, temperature)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.mgrpo_native.token_stats_forward(
        logits, labels, mask, per_row, number, *wanted
    )
    return outputs


def backward(
    out: Tensor,  # (..., V), may be `logits` itself
    grad_logprob: Tensor | None,  # (..., K)
    grad_entropy: Tensor | None,  # (...)
    grad_self_certainty: Tensor | None,  # (...)
    logits: Tensor,  # (..., V)
    labels: Tensor | None,  # (..., K)
    mask: Tensor | None,
    temperature: float | Tensor,
    logsumexp: Tensor,  # (...)
    entropy: Tensor | None,  # (...), needed with grad_entropy
) -> None:
    """Write the gradient of the logits into `out`."""
    per_row, number = (temperature, 1.0) if isinstance(temperature, Tensor) else (None, temperature)
    torch.ops.mgrpo_native.token_stats_backward(
        out, grad_logprob, grad_entropy, grad_self_certainty, logits, labels, mask, per_row, number, logsumexp, entropy
    )
