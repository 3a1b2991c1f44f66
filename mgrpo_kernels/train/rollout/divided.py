"""Generation by several ranks: each processes a share of the prompts, and all ranks get all responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mgrpo_kernels.train import parallel
from mgrpo_kernels.train.rollout import RolloutEngine, Rollouts, join


class DividedEngine(RolloutEngine):
    """Divides the prompts among the ranks, and returns all responses on every rank."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        *,
        generator: torch.Generator,
        first: int = 0,
        **options: Any,
    ) -> Rollouts:
        """See :class:`mgrpo_kernels.train.rollout.RolloutEngine`."""
        mine = parallel.my_share(len(prompts))
        part: Rollouts | None = None
        with parallel.sampling():
            if mine:
                some = prompts[mine.start : mine.stop]
                part = self.engine.sample(some, copies, generator=generator, first=first + mine.start, **options)
        parts = [each for each in parallel.all_gather(parallel.on_cpu(part)) if each is not None]
        return Rollouts(*(None if values is None else values.to(generator.device) for values in join(parts)))  # type: ignore[arg-type]


def divided(engine: RolloutEngine) -> RolloutEngine:
    """Return an engine that divides its work among the ranks."""
    return engine if parallel.world() == 1 else DividedEngine(engine)
