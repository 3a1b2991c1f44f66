"""Sampling responses: what every rollout engine offers, and the tensors that rollouts are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import MomentumModel

if TYPE_CHECKING:
    from mgrpo_kernels.train.config import Config
    from mgrpo_kernels.train.model.policy import Policy
    from mgrpo_kernels.train.plan.shape import Model, Work


class Rollouts(NamedTuple):
    """B responses, padded to R tokens, as long as the longest: on the model's device."""

    tokens: Tensor  # (B, R) int64, 0 beyond the end; an end-of-sequence token is part of the response
    mask: Tensor  # (B, R) bool
    logprobs: Tensor  # (B, R) float32, what the sampler gave each token, at its temperature; 0 beyond the end
    finished: Tensor  # (B,) bool: ended by an end-of-sequence token, not cut at the longest length
    entropy: Tensor | None = (
        None  # (B, R) float32, of what the token was drawn from, if the engine gives it; 0 beyond the end
    )
    self_certainty: Tensor | None = None  # the same


class Batch(NamedTuple):
    """How many prompts, and responses of each, an engine samples at once."""

    prompts: int
    copies: int


class RolloutEngine:
    """Samples responses. Its class answers for what the engine needs, so that nothing else asks which engine it is."""

    samples_in_place: ClassVar[bool] = True
    """Whether it samples from the policy's own weights, and not from a copy."""

    sync_seconds: float | None = None
    """Seconds that bringing weights to the engine has taken so far; None where it samples in place."""

    check: Callable[[], None] = staticmethod(lambda: None)
    """Called before every token; may raise."""

    @classmethod
    def build(cls, config: Config, policy: Policy, longest_prompt: int) -> RolloutEngine:
        """Return the engine that the configuration describes, for prompts of at most `longest_prompt` tokens."""
        raise NotImplementedError

    @classmethod
    def batch_of(cls, config: Config, work: Work, prompts: int, copies: int) -> Batch:
        """Return how much of `copies` responses to each of `prompts` prompts is sampled at once; the plan counts calls by it."""
        return Batch(prompts, copies)

    @classmethod
    def memory(cls, config: Config, model: Model, work: Work, device: str) -> tuple[dict[str, int], dict[str, int]]:
        """Return the bytes that the engine holds all along, and those while it samples, by what holds them; weights in place left out."""
        return {}, {}

    @classmethod
    def plan_lines(cls, config: Config, device: str) -> list[str]:
        """Return what the plan says of the engine beside its memory."""
        return []

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        *,
        temperature: float,
        generator: torch.Generator,
        momentum: MomentumModel | None = None,
        first: int = 0,
    ) -> Rollouts:
        """Sample `copies` responses to each prompt, those of one prompt together; from the momentum model where one is given.

        Random numbers depend on `generator` and a prompt's number, which is `first` for the first of these: who samples a part of the
        prompts gets what the whole would give. A temperature of 0 is greedy; log-probs are then at temperature 1.
        """
        raise NotImplementedError


def seeds_of(prompts: Sequence[Sequence[int]], first: int, generator: torch.Generator) -> list[int]:
    """Return a seed for each prompt; its copies add their number to it."""
    return torch.randint(2**62, (first + len(prompts),), generator=generator, device=generator.device)[first:].tolist()


def join(parts: Sequence[Rollouts]) -> Rollouts:
    """Return all rows of some rollouts, padded to the longest."""
    width = max(part.tokens.shape[1] for part in parts)

    def joined(values: Sequence[Tensor | None]) -> Tensor | None:
        there = [each for each in values if each is not None]
        if len(there) < len(values):
            return None
        return torch.cat([
            each if each.dim() == 1 else torch.nn.functional.pad(each, (0, width - each.shape[1])) for each in there
        ])  # fmt: skip

    return parts[0] if len(parts) == 1 else Rollouts(*(joined(column) for column in zip(*parts, strict=True)))  # type: ignore[arg-type]


def interleave(policy: Rollouts, momentum: Rollouts | None, prompts: int) -> Rollouts:
    """Return the rollouts prompt by prompt: first the policy's, then the momentum model's."""
    if momentum is None:
        return policy
    first = policy.finished.shape[0]
    rows = torch.cat(
        [
            torch.arange(first).view(prompts, -1),
            torch.arange(first, first + momentum.finished.shape[0]).view(prompts, -1),
        ],
        dim=1,
    ).reshape(-1)  # (B,)
    both = join([policy, momentum])
    return Rollouts(*(None if values is None else values[rows.to(values.device)] for values in both))  # type: ignore[arg-type]
