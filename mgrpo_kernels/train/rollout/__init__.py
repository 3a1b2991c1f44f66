"""The interface of rollout engines, and the tensors of rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import MomentumModel
from mgrpo_kernels.train.rollout.truncation import NO_TRUNCATION, Truncation, pad_kept

if TYPE_CHECKING:
    from mgrpo_kernels.train.config import Config
    from mgrpo_kernels.train.model.policy import Policy
    from mgrpo_kernels.train.plan.shape import Model, Work


class Rollouts(NamedTuple):
    """B responses, padded to the length R of the longest. All tensors are on the model's device."""

    tokens: Tensor  # (B, R) int64, 0 beyond the end; an end-of-sequence token is part of the response
    mask: Tensor  # (B, R) bool
    logprobs: Tensor  # (B, R) float32, log-probs of the engine at the sampling temperature; 0 beyond the end
    finished: Tensor  # (B,) bool: ended by an end-of-sequence token, not cut at the maximum length
    entropy: Tensor | None = None  # (B, R) float32, of each token's distribution; 0 beyond the end
    self_certainty: Tensor | None = None  # (B, R) float32, likewise
    kept: Tensor | None = (
        None  # (B, R, K) int32, ids of the entries that a truncated sampler kept for each token; -1 for none
    )


class Batch(NamedTuple):
    """The number of prompts, and of responses to each, that an engine processes at once."""

    prompts: int
    copies: int


class RolloutEngine:
    """Generates responses. The class also states the engine's memory and batches, so other code does not depend on the engine."""

    samples_in_place: ClassVar[bool] = True
    """Whether the engine generates from the policy's own weights, not from a copy."""

    sync_seconds: float | None = None
    """Seconds spent so far copying weights to the engine; None if it generates in place."""

    check: Callable[[], None] = staticmethod(lambda: None)
    """Function that is called before every token and may raise an error."""

    progress: Callable[[float], None] = staticmethod(lambda _: None)
    """Function that receives the share of a sampling call that is done, from 0 to 1, while the call runs."""

    @classmethod
    def build(cls, config: Config, policy: Policy, longest_prompt: int) -> RolloutEngine:
        """Return the configured engine for prompts of at most `longest_prompt` tokens."""
        raise NotImplementedError

    @classmethod
    def batch_of(cls, config: Config, work: Work, prompts: int, copies: int) -> Batch:
        """Return the part of `copies` responses to each of `prompts` prompts that is generated at once, for the plan."""
        return Batch(prompts, copies)

    @classmethod
    def memory(cls, config: Config, model: Model, work: Work, device: str) -> tuple[dict[str, int], dict[str, int]]:
        """Return the engine's memory in bytes, by purpose: what it always holds, and what it holds while it generates."""
        return {}, {}

    @classmethod
    def plan_lines(cls, config: Config, device: str) -> list[str]:
        """Return further lines of the plan about the engine."""
        return []

    slow: bool = False
    """Whether the model requires a slower way of generating than others, which the user should know."""

    def how(self) -> str:
        """Return a description of how the engine generates, for the user."""
        return type(self).__name__

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
        """Generate `copies` responses to each prompt, grouped by prompt; from the momentum model if one is given.

        Random numbers depend on `generator` and on a prompt's number, which is `first` for the first of `prompts`, so a part of the prompts
        gets the same responses as all of them together. Temperature 0 is greedy decoding; log-probs are then at temperature 1. With
        `truncation`, which greedy decoding ignores, tokens are sampled from the kept entries alone; the rollouts contain the kept sets, and
        log-probs and other statistics are over them.
        """
        raise NotImplementedError


def seeds_of(prompts: Sequence[Sequence[int]], first: int, generator: torch.Generator) -> list[int]:
    """Return a random seed for each prompt. The seed of a response is this seed plus the response's number."""
    return torch.randint(2**62, (first + len(prompts),), generator=generator, device=generator.device)[first:].tolist()


def join(parts: Sequence[Rollouts]) -> Rollouts:
    """Return the concatenation of some rollouts, padded to the longest."""
    width = max(part.tokens.shape[1] for part in parts)

    def joined(values: Sequence[Tensor | None]) -> Tensor | None:
        there = [each for each in values if each is not None]
        if len(there) < len(values):
            return None
        pad, most = torch.nn.functional.pad, max(each.shape[-1] for each in there)
        if there[0].dim() == 3:  # kept sets
            return torch.cat([pad_kept(each, width, most) for each in there])
        return torch.cat([each if each.dim() == 1 else pad(each, (0, width - each.shape[1])) for each in there])

    return parts[0] if len(parts) == 1 else Rollouts(*(joined(column) for column in zip(*parts, strict=True)))  # type: ignore[arg-type]


def interleave(policy: Rollouts, momentum: Rollouts | None, prompts: int) -> Rollouts:
    """Return the rollouts grouped by prompt, in each group first the policy's and then the momentum model's."""
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
