"""Batched sampling from a transformers model, with a key-value cache."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mgrpo_kernels import MomentumModel, token_stats_from_logits
from mgrpo_kernels.train.policy import Policy
from mgrpo_kernels.train.rollout import Rollouts, join


class TransformersEngine:
    """Samples from the policy in place; for the momentum model its weights are swapped in, and nothing is copied.

    Args:
        policy: the model.
        max_tokens: longest response.
        cache_tokens: most tokens (prompts, responses and padding) in the cache at once; at least one sequence always runs.
    """

    def __init__(self, policy: Policy, max_tokens: int, cache_tokens: int) -> None:
        self.policy = policy
        self.max_tokens = max_tokens
        self.cache_tokens = cache_tokens

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        *,
        temperature: float,
        generator: torch.Generator,
        momentum: MomentumModel | None = None,
    ) -> Rollouts:
        """Sample `copies` responses to each prompt; see :class:`mgrpo_kernels.train.rollout.Engine`."""
        rows = [prompt for prompt in range(len(prompts)) for _ in range(copies)]
        at_once = max(1, self.cache_tokens // (max(map(len, prompts)) + self.max_tokens))
        weights = momentum.swapped_into(self.policy.model) if momentum else contextlib.nullcontext()
        with weights, self.policy.autocast():
            return join([
                self._sample([prompts[row] for row in rows[start : start + at_once]], temperature, generator)
                for start in range(0, len(rows), at_once)
            ])  # fmt: skip

    def _sample(self, prompts: list[Sequence[int]], temperature: float, generator: torch.Generator) -> Rollouts:
        policy, device = self.policy, self.policy.device
        unique = list(
            dict.fromkeys(map(tuple, prompts))
        )  # each prompt runs once; its copies share what the cache then holds
        row_of = {prompt: row for row, prompt in enumerate(unique)}
        copy_of = torch.tensor([row_of[tuple(prompt)] for prompt in prompts], device=device)
        ids, prompt_mask = left_pad(unique, device)
        cache = policy.new_cache()
        logits = policy.next_logits(ids, prompt_mask, positions(prompt_mask), cache)[copy_of]
        cache.batch_select_indices(copy_of)

        B, P, R = len(prompts), ids.shape[1], self.max_tokens
        seen = torch.cat(
            [prompt_mask[copy_of], prompt_mask.new_ones(B, R)], dim=1
        )  # (B, P + R): what attention may see
        position = prompt_mask.sum(-1)[copy_of]  # of the next token
        tokens = torch.zeros(B, R, dtype=torch.int64, device=device)
        mask = torch.zeros(B, R, dtype=torch.bool, device=device)
        logprobs = torch.zeros(B, R, device=device)
        finished = torch.zeros(B, dtype=torch.bool, device=device)
        eos = torch.tensor(policy.eos, device=device)
        live = torch.arange(B, device=device)  # the row of each sequence in the cache
        running = torch.ones(B, dtype=torch.bool, device=device)  # of those in the cache
        for t in range(R):
            chosen, logprob = choose(logits, temperature, generator)
            tokens[live, t] = torch.where(running, chosen, 0)
            logprobs[live, t] = torch.where(running, logprob, 0.0)
            mask[live, t] = running
            ended = torch.isin(chosen, eos)
            finished[live] |= running & ended
            running = running & ~ended
            number = int(running.sum())
            if number == 0 or t == R - 1:
                break
            if 2 * number <= live.numel():  # half have ended: carry on with the others alone
                kept = running.nonzero().squeeze(-1)
                cache.batch_select_indices(kept)
                live, seen, position, chosen, running = (each[kept] for each in (live, seen, position, chosen, running))
            logits = policy.next_logits(chosen[:, None], seen[:, : P + t + 1], position[:, None], cache)
            position = position + 1
        if not bool(torch.isfinite(logprobs).all()):
            raise FloatingPointError(
                "rollout: want finite log-probs, got NaN or inf: the model's logits are not numbers any more"
            )
        return Rollouts(tokens[:, : t + 1], mask[:, : t + 1], logprobs[:, : t + 1], finished)


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a token from each row of ``(B, V)``; return the tokens and their log-probs, ``(B,)`` each."""
    if temperature == 0:
        tokens = logits.argmax(-1)
        temperature = 1.0
    else:
        weights = torch.softmax(logits.float() / temperature, dim=-1)
        # The largest of p_i / e_i, e_i exponential, falls on i with probability p_i, and needs no host sync.
        race = torch.empty_like(weights).exponential_(generator=generator)
        tokens = (weights / race).argmax(-1)
    logprob = token_stats_from_logits(logits, tokens, stats=("logprob",), temperature=temperature).logprob
    assert logprob is not None
    return tokens, logprob


def left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids ``(B, L)``, 0 before the start, and their mask."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    starts = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    return ids, torch.arange(width, device=device) >= starts[:, None]


def positions(mask: Tensor) -> Tensor:
    """Return each token's place in its sequence, as if it stood alone: ``(B, L)``."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)
