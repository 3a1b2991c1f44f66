"""The rollout engine that generates from the transformers model itself, in batches and with a key-value cache."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mgrpo_kernels import MomentumModel, TokenStats, token_stats_from_logits
from mgrpo_kernels.train.config import Config, ModelConfig, RolloutConfig
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.plan.shape import Model, Work, samplings, width_of
from mgrpo_kernels.train.rollout import Batch, RolloutEngine, Rollouts, join, seeds_of
from mgrpo_kernels.train.rollout.agreement import right_cache
from mgrpo_kernels.train.rollout.cache import Cache, PaddedCache, SharedCache, room_for
from mgrpo_kernels.train.rollout.draws import Draws, is_in_blocks, noise_steps
from mgrpo_kernels.train.rollout.truncation import NO_TRUNCATION, Kept, Truncation, keep, pad_kept

LOGITS_BYTES = {"cpu": 2**22, "cuda": 2**25}
"""Bytes of logits that are collected before their statistics are computed in one launch; at least those of one token."""
CACHE_SHARE = 16
"""Tokens in the cache for each token of a micro-batch. A cached token has only keys and values; a trained token has all activations of all
layers, which take more than 16 times as much memory in common models."""
LOOK_EVERY = {"cpu": 1, "cuda": 8}
"""Interval, in tokens, between two checks of which rollouts have ended. On a GPU, each check makes the host wait."""


class TransformersEngine(RolloutEngine):
    """Generates from the policy in place. To generate from the momentum model, its weights are swapped in without a copy.

    Args:
        policy: model that generates.
        max_tokens: maximum length of a response.
        cache_tokens: largest number of tokens in the cache, with responses of maximum length; at least one rollout always runs.
        stats: token statistics of the rollouts: "logprob", and optionally "entropy" and "self_certainty".
    """

    def __init__(self, policy: Policy, max_tokens: int, cache_tokens: int, stats: Sequence[str] = ("logprob",)) -> None:
        self.policy = policy
        self.max_tokens = max_tokens
        self.cache_tokens = cache_tokens
        self.stats = tuple(stats)
        self._call, self._calls = 0, 1  # the part of a sampling call that runs, and the number of parts
        self._checked: type[Cache] | None = None

    @property
    def cache(self) -> type[Cache]:
        """The cache that the model's rollouts are generated with."""
        return self._checked or (SharedCache if self.policy.unpackable is None else PaddedCache)

    @classmethod
    def build(cls, config: Config, policy: Policy, longest_prompt: int) -> TransformersEngine:
        """Return the engine with the fastest cache that gives the model's own log-probs; see :class:`RolloutEngine`.

        Raises:
            UsageError: there is no such cache.
        """
        engine = cls(policy, config.rollout.max_response_tokens, cache_tokens_of(config.rollout), config.statistics)
        engine._checked = right_cache(policy)
        engine.slow = engine._checked is not SharedCache
        return engine

    def how(self) -> str:
        """See :class:`mgrpo_kernels.train.rollout.RolloutEngine`."""
        return self.cache.HOW

    @classmethod
    def batch_of(cls, config: Config, work: Work, prompts: int, copies: int) -> Batch:
        """See :class:`mgrpo_kernels.train.rollout.RolloutEngine`."""
        return fitting(prompts, copies, work.prompt_tokens, work.response_tokens, cache_tokens_of(config.rollout))

    @classmethod
    def memory(cls, config: Config, model: Model, work: Work, device: str) -> tuple[dict[str, int], dict[str, int]]:
        """See :class:`mgrpo_kernels.train.rollout.RolloutEngine`."""
        batches = [cls.batch_of(config, work, *call) for call in samplings(work)]
        return {}, {
            "key-value cache": max(cache_bytes(config.model, model, work, each) for each in batches),
            "logits and noise": max(logits_bytes(config.model, model, work, each, device) for each in batches),
        }

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        *,
        temperature: float,
        generator: torch.Generator,
        momentum: MomentumModel | None = None,
        first: int = 0,
        truncation: Truncation = NO_TRUNCATION,
    ) -> Rollouts:
        """Generate `copies` responses to each prompt; see :class:`mgrpo_kernels.train.rollout.RolloutEngine`."""
        together, at_once = fitting(len(prompts), copies, max(map(len, prompts)), self.max_tokens, self.cache_tokens)
        seeds = seeds_of(prompts, first, generator)
        weights = momentum.swapped_into(self.policy.model) if momentum else contextlib.nullcontext()
        parts: list[Rollouts] = []
        self._calls = -(-len(prompts) // together) * -(-copies // at_once)
        with weights, self.policy.autocast():
            for start in range(0, len(prompts), together):
                rows = slice(start, start + together)
                for copy in range(0, copies, at_once):
                    generators = [generator_of(seed + copy, self.policy.device) for seed in seeds[rows]]
                    self._call = len(parts)
                    number = min(at_once, copies - copy)
                    parts.append(self._sample(prompts[rows], number, temperature, generators, truncation))
        return join(parts)

    def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        temperature: float,
        generators: Sequence[torch.Generator],
        truncation: Truncation,
    ) -> Rollouts:
        policy, device, R = self.policy, self.policy.device, self.max_tokens
        cache = self.cache(policy, prompts, copies, R)
        logits = cache.start()
        U, B = len(prompts), len(prompts) * copies
        draws = Draws(generators, copies, logits.shape[1], R) if temperature > 0 else None
        truncates = truncation.active and draws is not None
        scores = (KeptScores if truncates else Scores)(B, R, self.stats, temperature or 1.0, device)
        eos = torch.tensor(policy.eos, device=device)
        rows = torch.arange(B, device=device)  # which rollouts are in the cache
        ended = torch.zeros(B, dtype=torch.bool, device=device)  # of these
        for t in range(R):
            self.check()
            self.progress((self._call + t / R) / self._calls)
            if draws is not None and isinstance(scores, KeptScores):
                kept = keep(logits, temperature, truncation)
                chosen = scores.add_kept(rows, t, kept, draws.columns(t, rows, kept))
            else:
                chosen = logits.argmax(-1) if draws is None else draws.tokens(t, rows, logits, temperature)
                scores.add(rows, t, logits, chosen)
            ended |= (chosen[:, None] == eos).any(-1)
            if t == R - 1:
                break
            if t % LOOK_EVERY[device.type] == 0:
                live = (~ended).view(U, -1)
                number = live.sum(-1).tolist()  # of each prompt
                if not any(number):
                    break
                if 2 * (U - number.count(0)) * max(number) <= len(
                    rows
                ):  # fewer than half have not ended: a smaller block
                    prompt, slots = smallest_block(live, number)
                    cache.keep(prompt, slots)
                    index = (prompt[:, None] * live.shape[1] + slots).flatten()
                    rows, ended, chosen, U = rows[index], ended[index], chosen[index], len(prompt)
            logits = cache.extend(chosen)
        return rollouts_of(scores, scores.tokens[:, : t + 1], eos)


def smallest_block(live: Tensor, number: list[int]) -> tuple[Tensor, Tensor]:
    """Return the prompts with responses that have not ended, and of each as many responses as the largest `number` of them.

    `live` ``(U, copies)`` says which have not ended, `number` how many of each prompt. Those come first.
    """
    prompts = torch.tensor([prompt for prompt, n in enumerate(number) if n], device=live.device)
    slots = live[prompts].int().sort(dim=-1, descending=True, stable=True).indices[:, : max(number)]
    return prompts, slots


def rollouts_of(scores: Scores, tokens: Tensor, eos: Tensor) -> Rollouts:
    """Return what was sampled, each response up to its first end."""
    found = scores.finish()
    is_end = torch.isin(tokens, eos)
    mask = is_end.cumsum(-1) - is_end.long() == 0  # no end before
    mask = mask[:, : int(mask.sum(-1).max())]
    width = mask.shape[1]
    tokens = torch.where(mask, tokens[:, :width], 0)
    found = {name: torch.where(mask, each[:, :width], 0.0) for name, each in found.items()}
    if not bool(torch.isfinite(found["logprob"]).all()):
        raise FloatingPointError(
            "rollout: expected finite log-probs, got NaN or inf: the model's logits are no longer finite"
        )
    return Rollouts(
        tokens=tokens,
        mask=mask,
        logprobs=found["logprob"],
        finished=(is_end[:, :width] & mask).any(-1),
        entropy=found.get("entropy"),
        self_certainty=found.get("self_certainty"),
        kept=scores.kept(mask) if isinstance(scores, KeptScores) else None,
    )


def cache_tokens_of(options: RolloutConfig) -> int:
    """Return the largest number of tokens in the cache of a run."""
    return CACHE_SHARE * options.tokens_per_microbatch


def fitting(prompts: int, copies: int, prompt_tokens: int, response_tokens: int, cache_tokens: int) -> Batch:
    """Return how many prompts, and responses to each, fit into the cache at once; at least one response to one prompt."""
    together = cache_tokens // (prompt_tokens + copies * response_tokens)
    of_each = (cache_tokens - prompt_tokens) // response_tokens
    return Batch(min(prompts, max(1, together)), max(1, min(copies, of_each)))


def cache_bytes(options: ModelConfig, model: Model, work: Work, batch: Batch) -> int:
    """Return the size of the keys and values of a batch: once for each prompt, and the capacity for each rollout.

    While the capacity of a layer doubles, the old keys and values exist too, and attention copies what it reads, one layer at a time.
    """
    last = work.response_tokens - 1  # the last token is generated, but not processed
    of_rollout = room_for(last, work.response_tokens)
    tokens = batch.prompts * (work.prompt_tokens + batch.copies * of_rollout)
    return 2 * model.keys * width_of(options) * tokens * model.layers if last else 0


def logits_bytes(options: ModelConfig, model: Model, work: Work, batch: Batch, device: str) -> int:
    """Return the size of the collected logits, twice while they are concatenated, of a token's logits, and of what it is drawn with."""
    U, copies, c = batch.prompts, batch.copies, width_of(options)
    one = U * copies * model.vocabulary  # float32 logits
    waiting = min(one * 4 * work.response_tokens, LOGITS_BYTES[device] + one * 4)
    noise = 8 * one  # logits at the temperature, and probabilities
    if not is_in_blocks(model.vocabulary, device):
        noise = 4 * one * noise_steps(copies, model.vocabulary, work.response_tokens)
    attended = 2 * U * copies * (2 * model.keys * c + 3 * 4 * model.heads) * (work.prompt_tokens + work.response_tokens)
    return 2 * waiting + noise + noise // U + one * (4 + 4) + attended


def generator_of(seed: int, device: torch.device) -> torch.Generator:
    """Return a generator with this seed."""
    return torch.Generator(device=device).manual_seed(seed)


class Scores:
    """Collects the generated tokens, and their statistics from the logits that they were sampled from."""

    def __init__(self, batch: int, tokens: int, stats: Sequence[str], temperature: float, device: torch.device) -> None:
        self.temperature = temperature
        self.out = {name: torch.zeros(batch, tokens, device=device, dtype=torch.float32) for name in stats}
        self.tokens = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._bytes, self._most = 0, LOGITS_BYTES[device.type]

    def add(self, rows: Tensor, t: int, logits: Tensor, tokens: Tensor) -> None:
        """Add token `t` of some rollouts, with its logits ``(rows, V)``."""
        self._waiting.append((rows * self.tokens.shape[1] + t, logits, tokens))
        self._bytes += logits.nbytes
        if self._bytes >= self._most:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        slots, logits, tokens = (
            torch.cat(each) if len(each) > 1 else each[0] for each in zip(*self._waiting, strict=True)
        )
        self.tokens.view(-1)[slots] = tokens
        found: TokenStats = token_stats_from_logits(logits, tokens, stats=tuple(self.out), temperature=self.temperature)
        for name, values in self.out.items():
            values.view(-1)[slots] = getattr(found, name)
        self._waiting, self._bytes = [], 0

    def finish(self) -> dict[str, Tensor]:
        """Return the statistics, ``(B, R)`` each."""
        self._flush()
        return self.out


class KeptScores(Scores):
    """Collects tokens that were sampled from kept sets, their statistics over these sets and the sets."""

    def __init__(self, batch: int, tokens: int, stats: Sequence[str], temperature: float, device: torch.device) -> None:
        super().__init__(batch, tokens, stats, temperature, device)
        self._kept: list[Tensor] = []  # of each token, (B, K)

    def add_kept(self, rows: Tensor, t: int, kept: Kept, columns: Tensor) -> Tensor:
        """Add token `t` of some rollouts, which is in these columns of what is kept of their logits; return the tokens."""
        found, chosen = kept.statistics(columns), kept.ids.gather(1, columns.unsqueeze(1)).squeeze(1)
        self.tokens[rows, t] = chosen
        for name, values in self.out.items():
            values[rows, t] = found[name]
        ids = kept.stored()
        if ids.device.type == "cpu":  # on a GPU the host would have to wait for the number
            ids = ids[:, : int(kept.there.sum(-1).max())]
        of_all = ids.new_full((len(self.tokens), ids.shape[1]), -1)
        of_all[rows] = ids
        self._kept.append(of_all)
        return chosen

    def kept(self, mask: Tensor) -> Tensor:
        """Return the kept sets of the tokens in `mask` ``(B, R)``, as ``(B, R, K)`` with the K of the largest."""
        most = max(each.shape[1] for each in self._kept)
        sets = torch.cat([pad_kept(each.unsqueeze(1), 1, most) for each in self._kept[: mask.shape[1]]], 1)
        sets = sets.masked_fill_(~mask.unsqueeze(-1), -1)
        return sets[:, :, : max(1, int((sets >= 0).sum(-1).max()))]
