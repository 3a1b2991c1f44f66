"""Names and types that the token statistics share with their backends, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mgrpo_kernels.ops._statistics import Wanted


class TokenStats(NamedTuple):
    """Statistics of each token's distribution, in nats, of the labels' shape; None where one was not asked for."""

    logprob: Tensor | None  # log softmax(z)[label]
    entropy: Tensor | None  # -sum p log p
    self_certainty: Tensor | None  # logsumexp(z) - mean(z)


def check_stats(stats: Sequence[str]) -> Wanted:
    """Return which statistics `stats` names.

    Raises:
        ValueError: a name that is none, or no name at all.
    """
    if isinstance(stats, str) or not stats or any(name not in Wanted._fields for name in stats):
        raise ValueError(f"stats: expected a tuple of names out of {', '.join(Wanted._fields)}, got {stats!r}")
    return Wanted(*(name in stats for name in Wanted._fields))
