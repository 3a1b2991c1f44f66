"""The definition, in plain PyTorch: what every other backend is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels.backend import reference_unsupported as unsupported
from mgrpo_kernels.ops._statistics import Wanted, statistics_dtype

__all__ = ["backward", "forward", "unsupported"]


def _scaled(logits: Tensor, temperature: float | Tensor) -> Tensor:
    z = logits.to(statistics_dtype(logits))
    return z / _divisor(temperature, z)


def _divisor(temperature: float | Tensor, z: Tensor) -> float | Tensor:
    return temperature.to(z.dtype).unsqueeze(-1) if isinstance(temperature, Tensor) else temperature


def forward(
    logits: Tensor,  # (..., V)
    labels: Tensor | None,  # (..., K)
    mask: Tensor | None,  # (...)
    temperature: float | Tensor,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logprob ``(..., K)``, entropy, self_certainty, logsumexp ``(...)``; those not wanted are empty."""
    z = _scaled(logits, temperature)
    logsumexp, logp = z.logsumexp(-1), z.log_softmax(-1)
    logprob, entropy, self_certainty = (z.new_empty(0) for _ in range(3))
    if wanted.logprob and labels is not None:
        inside = (labels >= 0) & (labels < z.shape[-1])
        logprob = torch.where(inside, logp.gather(-1, labels.clamp(0, z.shape[-1] - 1).long()), torch.nan)
    if wanted.entropy:
        entropy = -torch.where(logp == -torch.inf, 0.0, logp.exp() * logp).sum(-1)  # 0 log 0 = 0
    if wanted.self_certainty:
        self_certainty = logsumexp - z.mean(-1)
    if mask is not None:
        logprob = torch.where(mask.unsqueeze(-1), logprob, 0.0) if wanted.logprob else logprob
        entropy = torch.where(mask, entropy, 0.0) if wanted.entropy else entropy
        self_certainty = torch.where(mask, self_certainty, 0.0) if wanted.self_certainty else self_certainty
        logsumexp = torch.where(mask, logsumexp, 0.0)
    return logprob, entropy, self_certainty, logsumexp


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
    """Write the gradient of the logits into `out`.

    d logprob / d z_j = [j = label] - p_j;  d entropy / d z_j = -p_j (log p_j + entropy);  d self_certainty / d z_j = p_j - 1 / V.
    """
    z = _scaled(logits, temperature)
    logp = z - logsumexp.unsqueeze(-1)
    p = logp.exp()
    grad = torch.zeros_like(z)
    if grad_logprob is not None and labels is not None:
        inside = (labels >= 0) & (labels < z.shape[-1])
        hits = torch.zeros_like(z).scatter_add_(
            -1, labels.clamp(0, z.shape[-1] - 1).long(), torch.where(inside, grad_logprob, torch.nan)
        )
        grad += hits - grad_logprob.sum(-1, keepdim=True) * p
    if grad_entropy is not None and entropy is not None:
        grad -= grad_entropy.unsqueeze(-1) * torch.where(logp == -torch.inf, 0.0, p * (logp + entropy.unsqueeze(-1)))
    if grad_self_certainty is not None:
        grad += grad_self_certainty.unsqueeze(-1) * (p - 1.0 / z.shape[-1])
    grad = grad / _divisor(temperature, z)
    grad = torch.where(z == -torch.inf, 0.0, grad)
    if mask is not None:
        grad = torch.where(mask.unsqueeze(-1), grad, 0.0)
    out.copy_(grad)
