"""The KL divergence from the reference model on the tokens of the answers, and on those of the reasoning before and after them."""

from __future__ import annotations

from torch import Tensor

from mgrpo_kernels.train import parallel

ROWS = 32
"""Largest number of rollouts of a rank that are measured: to find the tokens of an answer, its response is decoded several times."""


def kl_of_tokens(own: Tensor, ref: Tensor, estimator: str) -> Tensor:
    """Return the estimate of the KL divergence at each token from its log-probs, as the policy loss computes it."""
    difference = ref - own
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return 0.5 * difference.square()
    return difference.exp() - difference - 1.0


def kl_parts(own: Tensor, ref: Tensor, mask: Tensor, answer: Tensor, estimator: str) -> dict[str, float | None]:
    """Return the metrics kl_answer and kl_reasoning, over all ranks, each of which must call; None where there are no such tokens.

    Args:
        own: ``(B, R)`` log-probs under the policy, of rollouts that train.
        ref: ``(B, R)`` log-probs under the reference model.
        mask: ``(B, R)`` bool, the tokens of the responses.
        answer: ``(B, R)`` bool, the tokens of the answers. A response whose answer is not found counts for neither.
        estimator: k1, k2 or k3.
    """
    kl = kl_of_tokens(own.float(), ref.float(), estimator)
    found = answer.any(-1, keepdim=True)
    sums: dict[str, float] = {}
    for name, part in (("kl_answer", mask & answer), ("kl_reasoning", mask & found & ~answer)):
        sums |= {name: float(kl[part].sum()), f"{name} tokens": float(part.sum())}
    sums = parallel.added(sums)
    return {
        name: sums[name] / sums[f"{name} tokens"] if sums[f"{name} tokens"] else None
        for name in ("kl_answer", "kl_reasoning")
    }
