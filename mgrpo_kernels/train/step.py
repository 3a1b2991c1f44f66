"""One step of the method: rollout, score, filter, vote, advantage, loss, step, momentum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels import (
    MomentumModel,
    TokenStats,
    Vote,
    group_advantages,
    iqr_filter,
    majority_vote,
    trajectory_entropy,
)
from mgrpo_kernels.train.config import Config
from mgrpo_kernels.train.data import Example, Task, equal_to_gold
from mgrpo_kernels.train.labels import METHODS, Signals
from mgrpo_kernels.train.metrics import Clock
from mgrpo_kernels.train.monitor import Judgement, Trajectories, sample_lines, step_metrics
from mgrpo_kernels.train.policy import Policy
from mgrpo_kernels.train.rollout import Engine, Rollouts, interleave
from mgrpo_kernels.train.score import score
from mgrpo_kernels.train.streams import stream
from mgrpo_kernels.train.update import Batch, learning_rate, take_step


@dataclass
class Learner:
    """Everything that a step works on. What changes is the policy's weights, the optimizer and the momentum model."""

    config: Config
    task: Task
    policy: Policy
    engine: Engine
    optimizer: torch.optim.Optimizer
    momentum: MomentumModel | None
    reference: MomentumModel | None  # of the KL term: a copy of the weights that stays as it is, or the momentum model


def train_step(learner: Learner, examples: Sequence[Example], step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Take step `step` (from 1) on these prompts; return its metrics, and a few samples.

    Raises:
        FloatingPointError: something is not finite; the weights are then as before the step.
    """
    config, policy, task = learner.config, learner.policy, learner.task
    method, G = METHODS[config.method.method], config.rollout.rollouts
    clock = Clock(policy.device)

    with clock("rollout"):
        seen = roll_out(learner, examples, step)  # B = P x G trajectories
    with clock("score"):
        stats = score_by_sampler(learner, seen)
    with clock("vote"):
        assert stats.logprob is not None
        assert stats.entropy is not None
        entropy = trajectory_entropy(stats.entropy, mask=seen.rollouts.mask, reduction=config.method.entropy_reduction)
        survives = iqr_filter(entropy, G, k=config.method.iqr_k).keep if config.filters else seen.nonempty
        voters = survives & ~seen.by_policy if method.voters == "momentum" else survives
        vote = majority_vote(
            seen.answers,
            G,
            voters=voters.cpu(),
            equivalence=task.equivalence,
            min_share=config.method.min_share,
        )
        rewards = method.rewards(signals(learner, seen, stats, vote, step)).to(policy.device)
        if config.method.filter_scope == "penalise":
            rewards = torch.where(survives, rewards, 0.0)
        trains = who_trains(config, seen, survives)
        advantages = group_advantages(rewards, G, mask=trains)
    with clock("score"):
        batch = training_batch(learner, seen, stats.logprob, trains, advantages)
    with clock("update"):  # with nothing to learn from the weights stay; the schedule and the average go on
        updated = take_step(policy, learner.optimizer, batch, config, step) if batch.prompts else {}
    with clock("ema"):
        if learner.momentum is not None:
            learner.momentum.update(decay_of(config, step))

    judged = Judgement(entropy, survives, vote, rewards, trains, advantages)
    metrics = {
        "step": step,
        "learning_rate": learning_rate(config, step),
        **updated,
        **step_metrics(examples, seen, stats, judged, task.equivalence),
        "momentum_distance": None if learner.momentum is None else float(learner.momentum.distance(policy.model)),
        **clock.metrics(int(seen.rollouts.mask.sum())),
    }
    return metrics, sample_lines(step, examples[0], seen, judged, G, config.run.samples_per_step)


def roll_out(learner: Learner, examples: Sequence[Example], step: int) -> Trajectories:
    """Sample every prompt's rollouts, the policy's and then the momentum model's, and read their answers."""
    config, policy = learner.config, learner.policy
    prompts = policy.encode([example.prompt for example in examples])

    def part(copies: int, momentum: MomentumModel | None) -> Rollouts:
        purpose = "rollout" if momentum is None else "momentum rollout"
        generator = stream(config.run.seed, purpose, step, policy.device)
        return learner.engine.sample(
            prompts, copies, temperature=config.rollout.temperature, generator=generator, momentum=momentum
        )

    own = part(config.policy_rollouts, None)
    others = part(config.momentum_rollouts, learner.momentum) if config.momentum_rollouts else None
    rollouts = interleave(own, others, len(prompts))
    texts = policy.decode(rollouts.tokens, rollouts.mask)
    return Trajectories(
        prompts=[prompt for prompt in prompts for _ in range(config.rollout.rollouts)],
        rollouts=rollouts,
        place=(torch.arange(len(texts)) % config.rollout.rollouts).to(policy.device),
        by_policy=(torch.arange(len(texts)) % config.rollout.rollouts < config.policy_rollouts).to(policy.device),
        texts=texts,
        answers=[learner.task.extract(text) for text in texts],
        gold=[example.gold for example in examples for _ in range(config.rollout.rollouts)],
    )


def score_by_sampler(learner: Learner, seen: Trajectories) -> TokenStats:
    """Score every trajectory under the model that sampled it: ``(B, R)`` each."""
    policy, method = learner.policy, METHODS[learner.config.method.method]
    wanted = ("logprob", "entropy", *(("self_certainty",) if method.needs_self_certainty else ()))
    out = {name: torch.zeros(seen.rollouts.mask.shape, device=policy.device) for name in wanted}

    def fill(rows: Tensor) -> None:
        prompts = [seen.prompts[row] for row in rows.tolist()]
        tokens, mask = seen.rollouts.tokens[rows], seen.rollouts.mask[rows]
        stats = score(policy, prompts, tokens, mask, **scoring(learner.config), stats=wanted)
        for name, values in out.items():
            values[rows] = getattr(stats, name)

    fill(seen.by_policy.nonzero().squeeze(-1))
    if learner.config.momentum_rollouts:
        assert learner.momentum is not None
        with learner.momentum.swapped_into(policy.model):
            fill((~seen.by_policy).nonzero().squeeze(-1))
    return TokenStats(*(out.get(name) for name in TokenStats._fields))


def signals(learner: Learner, seen: Trajectories, stats: TokenStats, vote: Vote, step: int) -> Signals:
    """Return what a method may look at, on the CPU."""

    def mean(values: Tensor | None) -> Tensor | None:
        return None if values is None else trajectory_entropy(values, mask=seen.rollouts.mask).cpu()

    entropy = mean(stats.entropy)
    assert entropy is not None
    return Signals(
        vote=vote,
        group=learner.config.rollout.rollouts,
        entropy=entropy,
        self_certainty=mean(stats.self_certainty),
        correct=equal_to_gold(seen.answers, seen.gold, learner.task.equivalence),
        generator=stream(learner.config.run.seed, "rewards", step),
    )


def who_trains(config: Config, seen: Trajectories, survives: Tensor) -> Tensor:
    """Return which trajectories the loss sees, ``(B,)`` bool: never the momentum model's, and no empty one."""
    share = METHODS[config.method.method].train_share * config.policy_rollouts
    trains = seen.nonempty & (seen.place < min(config.policy_rollouts, max(2, round(share))))
    if config.method.filter_scope == "both":
        trains = trains & survives
    return trains & seen.rollouts.finished if config.rollout.truncated == "mask" else trains


def training_batch(learner: Learner, seen: Trajectories, logprobs: Tensor, trains: Tensor, advantages: Tensor) -> Batch:
    """Return the trajectories that train, scored under the reference too where there is a KL term."""
    rows = trains.nonzero().squeeze(-1)
    prompts = [seen.prompts[row] for row in rows.tolist()]
    tokens, mask = seen.rollouts.tokens[rows], seen.rollouts.mask[rows]
    ref = None
    if learner.reference is not None:
        with learner.reference.swapped_into(learner.policy.model):
            ref = score(learner.policy, prompts, tokens, mask, **scoring(learner.config), stats=("logprob",)).logprob
    return Batch(prompts, tokens, mask, logprobs[rows], ref, advantages[rows])


def scoring(config: Config) -> dict[str, Any]:
    return {"temperature": config.rollout.temperature, "budget": config.rollout.tokens_per_microbatch}


def decay_of(config: Config, step: int) -> float:
    """Return the momentum model's decay at a step: from the first to the last along a cosine."""
    start, end = config.method.decay, config.decay_end
    progress = (step - 1) / max(1, config.optim.steps - 1)
    return start if start == end else end - (end - start) * 0.5 * (1.0 + math.cos(math.pi * progress))
