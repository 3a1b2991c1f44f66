"""Truncated sampling (top-k, top-p, min-p): which vocabulary entries a sampler keeps for a token, and their distribution."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MOST_KEPT = 512
"""Entries that a truncated sampler keeps for a token at most, the likeliest ones: so many are stored for each token of a rollout."""


class Truncation(NamedTuple):
    """The options of truncated sampling. They apply in this order, as in vLLM: min-p, top-k, top-p of what these keep."""

    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @property
    def active(self) -> bool:
        """Whether anything is cut off."""
        return self != NO_TRUNCATION

    @property
    def most(self) -> int:
        """The largest number of entries that are kept for a token: `top_k`, but at most `MOST_KEPT`."""
        return min(self.top_k or MOST_KEPT, MOST_KEPT)


NO_TRUNCATION = Truncation()


class Kept(NamedTuple):
    """What a truncated sampler keeps of some rows of logits, the likeliest entry first."""

    ids: Tensor  # (n, K) int64
    logprobs: Tensor  # (n, K) float32, of the distribution over the kept entries; -inf for an entry that is not kept

    @property
    def there(self) -> Tensor:
        """Which entries are kept, ``(n, K)`` bool."""
        return self.logprobs > -torch.inf

    def stored(self) -> Tensor:
        """Return the kept ids as :func:`mgrpo_kernels.linear_token_stats` takes them, ``(n, K)`` int32, -1 for no entry."""
        return torch.where(self.there, self.ids, -1).int()

    def draw(self, noise: Tensor) -> Tensor:
        """Return the column ``(n,)`` of one entry of each row, sampled with Gumbel noise ``(n, V)`` of the whole vocabulary."""
        return (noise.gather(1, self.ids) + self.logprobs).argmax(-1)

    def statistics(self, columns: Tensor) -> dict[str, Tensor]:
        """Return the statistics ``(n,)`` of the tokens in these columns, over the kept entries."""
        there = self.there
        finite = torch.where(there, self.logprobs, 0.0)
        return {
            "logprob": self.logprobs.gather(1, columns.unsqueeze(1)).squeeze(1),
            "entropy": -(self.logprobs.exp() * finite).sum(-1),
            "self_certainty": -finite.sum(-1) / there.sum(-1),
        }


def keep(logits: Tensor, temperature: float, truncation: Truncation) -> Kept:
    """Return what the sampler keeps of float32 logits ``(n, V)`` at this temperature; at least the likeliest entry of each row."""
    z, ids = (logits / temperature).topk(min(truncation.most, logits.shape[1]), dim=-1)
    if truncation.min_p > 0:
        z = z.masked_fill(z < z[:, :1] + math.log(truncation.min_p), -torch.inf)
    before = z.softmax(-1).cumsum(-1).roll(1, -1)  # the probability of the entries that are likelier
    before[:, 0] = 0.0
    if truncation.top_p < 1:
        z = z.masked_fill(before >= truncation.top_p, -torch.inf)
    return Kept(ids, z.log_softmax(-1))


def pad_kept(kept: Tensor, tokens: int, most: int) -> Tensor:
    """Return kept sets ``(B, R, K)`` padded with -1 to `tokens` and `most` entries."""
    return torch.nn.functional.pad(kept, (0, most - kept.shape[2], 0, tokens - kept.shape[1]), value=-1)
