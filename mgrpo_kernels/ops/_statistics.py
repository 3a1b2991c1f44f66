"""The algebra that every kernel of token statistics shares: a mergeable state of a row of logits, and its gradient.

Kernels see the vocabulary in tiles (and ranks see shards of it). From each they keep, per row of final logits z:

    MAX      m = max_j z_j
    SUM_EXP  s = sum_j exp(z_j - m)
    SUM_EXPZ t = sum_j exp(z_j - m) (z_j - m)      a z_j of -inf counts 0
    SUM      sum_j z_j
    LABEL    z_label where the label is in this part of the vocabulary, else 0
    COUNT    how many z_j

whence logsumexp = m + log s, entropy = log s - t / s, self_certainty = logsumexp - SUM / COUNT.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX, SUM_EXP, SUM_EXPZ, SUM, LABEL, COUNT = range(6)
STATE_ROWS = 6


class Wanted(NamedTuple):
    """Which statistics are asked for; in a backward pass, which of them have a gradient. Kernels compute nothing for the others."""

    logprob: bool
    entropy: bool
    self_certainty: bool


EVERYTHING = Wanted(True, True, True)


class Statistics(NamedTuple):
    """Per row, float32 (float64 from a float64 state)."""

    logprob: Tensor
    entropy: Tensor
    self_certainty: Tensor
    logsumexp: Tensor


def statistics_dtype(values: Tensor) -> torch.dtype:
    """Return the dtype of statistics and losses: float32, or float64 for float64 values."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def without_unwanted(state: Tensor, wanted: Wanted) -> Tensor:
    """Return the state, with NaN written to the sums of statistics that are not wanted: none of these reads as a number then."""
    for row, want in zip((LABEL, SUM_EXPZ, SUM), wanted, strict=True):
        if not want:
            state[row] = torch.nan
    return state


def row_state(z: Tensor, labels: Tensor | None, first: int = 0) -> Tensor:
    """Return the state ``(6, N)`` of final logits ``(N, C)`` whose first column is vocabulary entry `first`: the definition."""
    maximum = z.amax(-1)
    shifted = z - torch.where(maximum == -torch.inf, 0.0, maximum).unsqueeze(-1)
    exp = shifted.exp()
    label = torch.zeros_like(maximum)
    if labels is not None:
        inside = (labels >= first) & (labels < first + z.shape[-1])
        picked = z.gather(-1, (labels.long() - first).clamp(0, z.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
        label = torch.where(inside, picked, 0.0)
    expz = torch.where(shifted == -torch.inf, 0.0, exp * shifted).sum(-1)
    return torch.stack([maximum, exp.sum(-1), expz, z.sum(-1), label, torch.full_like(maximum, z.shape[-1])])


def merge(states: Tensor) -> Tensor:
    """Merge the states ``(parts, 6, N)`` of parts of the vocabulary into one ``(6, N)``, in order: the same bits every time."""
    maximum = states[:, MAX].amax(0)
    shift = torch.where(states[:, MAX] == -torch.inf, -torch.inf, states[:, MAX] - maximum)  # (parts, N)
    scale = shift.exp()
    sum_exp = states[:, SUM_EXP] * scale
    expz = states[:, SUM_EXPZ] * scale + torch.where(shift == -torch.inf, 0.0, sum_exp * shift)
    merged = states.sum(0)
    merged[MAX], merged[SUM_EXP], merged[SUM_EXPZ] = maximum, sum_exp.sum(0), expz.sum(0)
    return merged


def finish(state: Tensor, labels: Tensor | None) -> Statistics:
    """Turn a whole row's state ``(6, N)`` into its statistics. A label outside [0, COUNT) makes its logprob NaN.

    Statistics of which the state has no sums are NaN too.
    """
    log_sum = state[SUM_EXP].log()
    logsumexp = state[MAX] + log_sum
    logprob = state[LABEL] - logsumexp
    if labels is not None:
        logprob = torch.where((labels >= 0) & (labels < state[COUNT]), logprob, torch.nan)
    entropy = log_sum - state[SUM_EXPZ] / state[SUM_EXP]
    return Statistics(logprob, entropy, logsumexp - state[SUM] / state[COUNT], logsumexp)


def gradient_coefficients(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_self_certainty: Tensor | None,
    entropy: Tensor | None,
    count: Tensor | float,
    mask: Tensor | None,
    like: Tensor,
) -> Tensor:
    """Return the coefficients ``(4, N)`` = (alpha, beta, gamma, delta) of the gradient of a row of final logits.

        d z_j = p_j (alpha + beta log p_j) + gamma + delta [j = label],    0 where z_j = -inf

    from d logprob = [j = label] - p_j, d entropy = -p_j (log p_j + entropy), d self_certainty = p_j - 1 / COUNT.
    All four are 0 in a masked row. `like` ``(N,)`` gives dtype and device.
    """
    alpha, beta, gamma, delta = (torch.zeros_like(like) for _ in range(4))
    if grad_logprob is not None:
        alpha = alpha - grad_logprob
        delta = grad_logprob.to(like.dtype)
    if grad_self_certainty is not None:
        alpha = alpha + grad_self_certainty
        gamma = -grad_self_certainty / count
    if grad_entropy is not None:
        assert entropy is not None
        alpha = alpha - grad_entropy * entropy
        beta = -grad_entropy
    coefficients = torch.stack([alpha, beta, gamma, delta])
    return coefficients if mask is None else torch.where(mask, coefficients, 0.0)


def row_gradient(z: Tensor, labels: Tensor | None, coefficients: Tensor, logsumexp: Tensor, first: int = 0) -> Tensor:
    """Return the gradient ``(N, C)`` of final logits ``(N, C)``, columns as in :func:`row_state`: the definition."""
    alpha, beta, gamma, delta = coefficients.unsqueeze(-1)  # (N, 1) each
    logp = z - logsumexp.unsqueeze(-1)
    grad = logp.exp() * (alpha + beta * torch.where(logp == -torch.inf, 0.0, logp)) + gamma
    if labels is not None:
        columns = torch.arange(first, first + z.shape[-1], device=z.device)
        grad = grad + delta * (columns == labels.unsqueeze(-1))
    return torch.where(z == -torch.inf, 0.0, grad)
