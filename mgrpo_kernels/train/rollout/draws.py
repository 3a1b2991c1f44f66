"""Random draws of tokens. Each prompt has its own generator, so its random numbers do not depend on the other prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mgrpo_kernels.train.rollout.truncation import Kept

NOISE_NUMBERS = 2**18
"""Random numbers per prompt that are drawn at once; at least those of one token."""
BLOCK = 512
"""Entries of the vocabulary in a block, of which one number chooses the block and another the entry. A vocabulary of at most one block,
and any on a GPU, is sampled with one number for each entry."""


def is_in_blocks(vocabulary: int, device: torch.device | str) -> bool:
    """Return whether two random numbers choose a token, instead of one for each entry of the vocabulary."""
    return vocabulary > BLOCK and torch.device(device).type == "cpu"


def noise_steps(copies: int, numbers: int, tokens: int) -> int:
    """Return for how many tokens random numbers are drawn at once, `numbers` for each token."""
    return max(1, min(tokens, NOISE_NUMBERS // (copies * numbers)))


class Draws:
    """Random numbers of U prompts with `copies` rollouts each, and the tokens that they choose.

    Over a GPU or over few entries, the token with the largest sum of log-prob and Gumbel noise is chosen. On a CPU that many random numbers
    take longer than the product of the head, so the cumulative distribution of a larger vocabulary is inverted: that of its blocks
    of BLOCK entries by one uniform number, and that of the entries in the chosen block by another.
    """

    def __init__(self, generators: Sequence[torch.Generator], copies: int, vocabulary: int, tokens: int) -> None:
        device = generators[0].device
        self.generators = generators
        self.in_blocks = is_in_blocks(vocabulary, device)
        numbers = 2 if self.in_blocks else vocabulary
        self.steps = noise_steps(copies, numbers, tokens)
        shape, dtype = (
            (self.steps, len(generators), copies, numbers),
            torch.float64 if self.in_blocks else torch.float32,
        )
        self.block = torch.empty(shape, dtype=dtype, device=device)

    def numbers(self, t: int, rows: Tensor) -> Tensor:
        """Return the random numbers of token `t` of some rollouts: uniform ``(rows, 2)`` float64, or Gumbel noise ``(rows, V)``.

        Tokens must be requested in order, from 0.
        """
        if t % self.steps == 0:
            for prompt, generator in enumerate(self.generators):
                drawn = torch.empty_like(self.block[:, prompt], memory_format=torch.contiguous_format)
                drawn = (
                    drawn.uniform_(generator=generator) if self.in_blocks else drawn.exponential_(generator=generator)
                )
                self.block[:, prompt] = drawn
            if not self.in_blocks:
                self.block.clamp_min_(torch.finfo(self.block.dtype).tiny).log_().neg_()
        now = self.block[t % self.steps].flatten(0, 1)  # (U copies, numbers)
        return now if len(rows) == len(now) else now[rows]

    def tokens(self, t: int, rows: Tensor, logits: Tensor, temperature: float) -> Tensor:
        """Return token `t` of some rollouts, sampled from their logits ``(rows, V)`` at this temperature."""
        numbers = self.numbers(t, rows)
        if self.in_blocks:
            return from_blocks((logits if temperature == 1 else logits / temperature).softmax(-1), numbers)
        return torch.add(numbers, logits, alpha=1 / temperature).argmax(-1)

    def columns(self, t: int, rows: Tensor, kept: Kept) -> Tensor:
        """Return the column of `kept` of token `t` of some rollouts, sampled from what is kept."""
        numbers = self.numbers(t, rows)
        return inverted(kept.logprobs.exp(), numbers[:, 0]) if self.in_blocks else kept.draw(numbers)


def inverted(masses: Tensor, uniform: Tensor) -> Tensor:
    """Return for each row of ``(n, K)`` the column in whose part of the row's cumulative sum `uniform` ``(n,)``, in [0, 1), lies.

    A column without mass is never returned. Masses that are NaN give any column.
    """
    total = masses.cumsum(-1, dtype=torch.float64)
    place = (uniform * total[:, -1]).unsqueeze(-1)  # below the last sum, rounded too
    return torch.searchsorted(total, place, right=True).squeeze(-1).clamp_max_(masses.shape[1] - 1)


def from_blocks(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return an entry for each row of ``(n, V)``, chosen by two numbers of `uniform` ``(n, 2)``."""
    vocabulary = probabilities.shape[1]
    whole = vocabulary // BLOCK * BLOCK
    masses = probabilities[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1)
    if whole < vocabulary:
        masses = torch.cat([masses, probabilities[:, whole:].sum(-1, keepdim=True)], -1)
    inside = torch.arange(BLOCK, device=masses.device)
    entries = inverted(masses, uniform[:, 0]).unsqueeze(-1) * BLOCK + inside  # (n, BLOCK)
    of_block = probabilities.gather(1, entries.clamp_max(vocabulary - 1)).masked_fill_(entries >= vocabulary, 0.0)
    return entries.gather(1, inverted(of_block, uniform[:, 1]).unsqueeze(-1)).squeeze(-1).clamp_max_(vocabulary - 1)
