"""One training step: rollouts, scores, filter, vote, advantages, loss, optimizer step, momentum update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from mgrpo_kernels import MomentumModel, Teacher, TokenStats, top_entropy_mask
from mgrpo_kernels.method import Selection, answer_tokens, select
from mgrpo_kernels.train import parallel
from mgrpo_kernels.train.config import Config, RolloutConfig
from mgrpo_kernels.train.data.task import Example, Task
from mgrpo_kernels.train.model.lora import Adapter
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.rng import generator_for
from mgrpo_kernels.train.rollout import RolloutEngine, Rollouts, interleave
from mgrpo_kernels.train.score import score
from mgrpo_kernels.train.update import Batch, learning_rate, take_step
from mgrpo_kernels.train.watch.kl_parts import ROWS, kl_parts
from mgrpo_kernels.train.watch.metrics import Clock, peak_memory_bytes
from mgrpo_kernels.train.watch.step_metrics import Trajectories, sample_lines, spread, step_metrics
from mgrpo_kernels.train.watch.unanswered import FIRST_STEPS, warn_of_answers
from mgrpo_kernels.vote.extraction import read_answers


@dataclass
class Learner:
    """Everything that a step uses. It changes the policy's weights, the optimizer and the momentum model."""

    config: Config
    task: Task
    policy: Policy
    engine: RolloutEngine
    optimizer: torch.optim.Optimizer
    momentum: Teacher | None
    reference: MomentumModel | Adapter | None  # of the KL penalty: the initial weights or the momentum model
    warned_of_answers: bool = False
    skipped: int = 0  # number of steps skipped because their loss or gradient was not finite


def train_step(learner: Learner, examples: Sequence[Example], step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Take step `step`, counted from 1, on these prompts; return its metrics and a few samples.

    Raises:
        FloatingPointError: a value is not finite; the weights are then unchanged.
    """
    config, policy = learner.config, learner.policy
    clock = Clock(policy.device)

    mine = parallel.my_share(len(examples))  # all of them if there is one rank
    with parallel.gathered(policy.model):
        synced = learner.engine.sync_seconds
        with clock("rollout"), record_function("rollout"):
            seen = roll_out(learner, examples[mine.start : mine.stop], step, mine.start)  # B = P x G trajectories
        if synced is not None:
            spent = (learner.engine.sync_seconds or 0.0) - synced
            clock.seconds |= {"time_sync": spent, "time_rollout": clock.seconds["time_rollout"] - spent}
        with clock("score"), record_function("score"):
            stats = score_by_sampler(learner, seen)
            own = score_by_policy(learner, seen, stats) if config.policy_scores_all else stats
        with clock("vote"), record_function("vote"):
            measured = own if config.method.momentum_scored_by == "policy" else stats
            seen = seen._replace(rewards=own_rewards(learner, examples[mine.start : mine.stop], seen))
            selection = select_rollouts(learner, seen, measured, step)
        with clock("score"), record_function("score"):
            batch = training_batch(learner, seen, stats, own, selection)
            divergences = kl_by_part(learner, seen, own, selection, batch)
    # If no rollout trains, the optimizer step is skipped, but the schedule and the momentum model still advance.
    with clock("update"), record_function("update"):
        any_trains = parallel.on_any(bool(batch.prompts))
        updated = take_step(policy, learner.optimizer, batch, config, step) if any_trains else {}

    seen = seen._replace(rollouts=seen.rollouts._replace(kept=None))  # the metrics do not need the kept sets
    seen, stats, selection = parallel.from_all(seen), parallel.from_all(stats), parallel.from_all(selection)
    measured_step = step_metrics(examples, seen, stats, selection)
    with clock("ema"), record_function("ema"):
        if learner.momentum is not None:
            decay = config.method.decay_at(step, config.optim.steps) if config.method.teacher == "ema" else None
            # The weights do not change before the distance below is computed, so the update may overlap.
            learner.momentum.advance(measured_step, decay, overlap=True)
    # If the engine computed the scores, the update compares them with its own forward pass.
    uncompared = {"behaviour_mismatch": None} if engine_scores(learner, seen) else {}
    if step <= FIRST_STEPS and selection.vote is not None and not learner.warned_of_answers:
        prompts = [example.prompt for example in examples]
        learner.warned_of_answers = warn_of_answers(seen.texts, seen.answers, prompts, selection.vote.labels)
    metrics = {
        "step": step,
        "learning_rate": learning_rate(config.optim, step),
        "skipped_steps": learner.skipped,
        **measured_step,
        **teacher_metrics(learner.momentum),
        **uncompared,
        **updated,
        **divergences,
        "momentum_distance": None if learner.momentum is None else float(learner.momentum.distance(policy.model)),
        **clock.metrics(int(seen.rollouts.mask.sum())),
        "peak_memory_bytes": int(parallel.largest(peak_memory_bytes(policy.device))),
    }
    prompts = examples[0].wordings(config.rollout.rollouts, config.second_wording_rollouts)
    return metrics, sample_lines(step, examples[0], prompts, seen, selection, config.run.samples_per_step)


def teacher_metrics(teacher: Teacher | None) -> dict[str, Any]:
    """Return the state of the momentum model's schedule after a step; no metrics without a momentum model."""
    if teacher is None:
        return {}
    gate = "; ".join(teacher.waits_for) or None
    return {"teacher_refreshes": teacher.refreshes, "teacher_age": teacher.age, "teacher_gate": gate}


def roll_out(learner: Learner, examples: Sequence[Example], step: int, first: int = 0) -> Trajectories:
    """Generate every prompt's rollouts, first the policy's and then the momentum model's, and extract their answers.

    `first` is the number of the first of these prompts in the step; earlier prompts belong to other ranks.
    """
    config, policy = learner.config, learner.policy
    prompts = policy.encode([example.prompt for example in examples])
    reworded = prompts
    if config.second_wording_rollouts:
        reworded = policy.encode([example.second_wording for example in examples])

    def part(asked: list[list[int]], copies: int, purpose: str, momentum: MomentumModel | None) -> Rollouts:
        generator = generator_for(config.run.seed, purpose, step, policy.device)
        with parallel.sampling():
            return learner.engine.sample(
                asked,
                copies,
                temperature=config.rollout.temperature,
                generator=generator,
                momentum=momentum,
                first=first,
                truncation=config.rollout.truncation,
            )

    # The last rollouts of each prompt: those of another model, or those of another wording of the question.
    last = config.momentum_rollouts or config.second_wording_rollouts
    own, others = part(prompts, config.rollout.rollouts - last, "rollout", None), None
    if config.momentum_rollouts:
        others = part(reworded, last, "momentum rollout", learner.momentum)
    elif last:
        others = part(reworded, last, "rollout of the second wording", None)
    rollouts = interleave(own, others, len(prompts))
    texts = policy.decode(rollouts.tokens, rollouts.mask)
    index, group = torch.arange(len(texts)) % config.rollout.rollouts, config.rollout.rollouts
    return Trajectories(
        prompts=[
            asked
            for first_asked, second_asked in zip(prompts, reworded, strict=True)
            for asked in [first_asked] * (group - last) + [second_asked] * last
        ],
        rollouts=rollouts,
        by_policy=(index < config.policy_rollouts).to(policy.device),
        texts=texts,
        answers=read_answers(learner.task.extract, texts, rollouts.finished.tolist()),
        gold=[example.gold for example in examples for _ in range(group)],
    )


def score_by_sampler(learner: Learner, seen: Trajectories) -> TokenStats:
    """Return the statistics of every rollout under the model that generated it, ``(B, R)`` each.

    An engine that generates from the model's own weights computes the statistics from the logits and returns them with the tokens. Scoring
    would compute them again, with different rounding, so it runs only for other engines.
    """
    rollouts = seen.rollouts
    if engine_scores(learner, seen):
        return TokenStats(rollouts.logprobs, rollouts.entropy, rollouts.self_certainty)
    stats = score_rows(learner, seen, seen.by_policy, blank(learner, seen))
    if not learner.config.momentum_rollouts:
        return stats
    assert learner.momentum is not None
    with learner.momentum.swapped_into(learner.policy.model):
        return score_rows(learner, seen, ~seen.by_policy, stats)


def engine_scores(learner: Learner, seen: Trajectories) -> bool:
    """Return True if the engine's own statistics are used instead of a scoring pass.

    They are not used if the momentum model's rollouts train, because their weights are ratios of two scores.
    """
    has = {"logprob", *(name for name in ("entropy", "self_certainty") if getattr(seen.rollouts, name) is not None)}
    return has >= set(learner.config.statistics) and not learner.config.method.train_momentum_rollouts


def score_by_policy(learner: Learner, seen: Trajectories, stats: TokenStats) -> TokenStats:
    """Return `stats` with the momentum model's rollouts scored under the policy, ``(B, R)`` each."""
    return score_rows(learner, seen, ~seen.by_policy, stats)


def score_rows(learner: Learner, seen: Trajectories, chosen: Tensor, stats: TokenStats) -> TokenStats:
    """Return `stats` with the `chosen` rollouts, ``(B,)`` bool, scored with the model's current weights."""
    rows = chosen.nonzero().squeeze(-1)
    prompts = [seen.prompts[row] for row in rows.tolist()]
    tokens, mask = seen.rollouts.tokens[rows], seen.rollouts.mask[rows]
    wanted = tuple(name for name, values in stats._asdict().items() if values is not None)
    options = scoring(learner.config.rollout)
    kept = None if seen.rollouts.kept is None else seen.rollouts.kept[rows]
    scored = score(learner.policy, prompts, tokens, mask, **options, stats=wanted, kept=kept)
    return stats._replace(**{name: getattr(stats, name).index_copy(0, rows, getattr(scored, name)) for name in wanted})


def blank(learner: Learner, seen: Trajectories) -> TokenStats:
    """Return zeros for the statistics that the method needs, ``(B, R)`` each."""
    zeros = torch.zeros(seen.rollouts.mask.shape, device=learner.policy.device, dtype=torch.float32)
    wanted = learner.config.statistics
    return TokenStats(*(zeros if name in wanted else None for name in TokenStats._fields))


def own_rewards(learner: Learner, examples: Sequence[Example], seen: Trajectories) -> Tensor | None:
    """Return the rewards of the user's own function for the rollouts of these prompts, ``(B,)``; None without one."""
    if learner.task.reward is None:
        return None
    group, last = learner.config.rollout.rollouts, learner.config.second_wording_rollouts
    prompts = [text for example in examples for text in example.wordings(group, last)]
    return torch.tensor(learner.task.reward(prompts, seen.texts, seen.answers, seen.gold), dtype=torch.float32)


def policy_voters(learner: Learner, seen: Trajectories) -> Tensor | None:
    """Return the rollouts that may vote, ``(B,)`` bool, so that the momentum model has its share; None if all of them may."""
    config = learner.config
    if config.method.teacher_votes is None:
        return None
    assert learner.momentum is not None
    voters = learner.momentum.policy_voters(config.policy_rollouts, config.momentum_rollouts)
    index = torch.arange(len(seen.texts)) % config.rollout.rollouts
    return (index < voters) | ~seen.by_policy.cpu()


def select_rollouts(learner: Learner, seen: Trajectories, stats: TokenStats, step: int) -> Selection:
    """Return the result of filter, vote and rewards for this rank's prompts; `stats` are the statistics that the method uses."""
    config = learner.config
    group, generator = config.rollout.rollouts, generator_for(config.run.seed, "rewards", step)
    before = parallel.my_share(config.rollout.prompts_per_step).start * group
    torch.randint(0, 2, (before,), generator=generator)  # skip the random numbers of the ranks before this one
    return select(
        seen.rollouts.mask,
        seen.answers,
        group,
        config.method,
        by_momentum=~seen.by_policy,
        may_vote=policy_voters(learner, seen),
        second_wording=of_second_wording(config, len(seen.texts)),
        may_train=seen.rollouts.finished if config.rollout.truncated == "mask" else None,
        entropy=stats.entropy,
        self_certainty=stats.self_certainty,
        logprob=stats.logprob if config.method.row.needs_logprob else None,
        tokens=seen.rollouts.tokens if config.method.row.needs_tokens else None,
        answer_tokens=tokens_of_answers(learner, seen) if config.method.weight_of_answer < 1.0 else None,
        gold=seen.gold,
        rewards=seen.rewards,
        reward_share=None if seen.rewards is None else config.method.reward_share,
        scale=config.loss.advantage_scale,
        equivalence=learner.task.equivalence,
        generator=generator,
    )


def of_second_wording(config: Config, rollouts: int) -> Tensor | None:
    """Return which rollouts answer the second wording of their question, ``(B,)`` bool; None if none do."""
    if not config.second_wording_rollouts:
        return None
    group = config.rollout.rollouts
    return torch.arange(rollouts) % group >= group - config.second_wording_rollouts


def tokens_of_answers(learner: Learner, seen: Trajectories, rows: Sequence[int] | None = None) -> Tensor:
    """Return which tokens spell the final answers of these rollouts, or of all of them, ``(rows, R)`` bool."""
    mask, tokenizer = seen.rollouts.mask, learner.policy.tokenizer
    rows = range(len(seen.texts)) if rows is None else rows
    lengths, tokens = mask.sum(-1).tolist(), seen.rollouts.tokens
    ids = [tokens[row, : lengths[row]].tolist() for row in rows]

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    texts, answers = [seen.texts[row] for row in rows], [seen.answers[row] for row in rows]
    return answer_tokens(ids, texts, answers, decode, mask.shape[1])


def kl_by_part(
    learner: Learner, seen: Trajectories, own: TokenStats, selection: Selection, batch: Batch
) -> dict[str, float | None]:
    """Return the KL divergence from the reference model on the tokens of the answers and on the others, for some rollouts that train."""
    if batch.ref_logprobs is None or not batch.prompts:
        return {}
    assert own.logprob is not None
    chosen = torch.tensor(spread(len(batch.prompts), ROWS), dtype=torch.long, device=batch.tokens.device)
    rows = selection.trains.nonzero().squeeze(-1).to(chosen.device)[chosen]
    answer = tokens_of_answers(learner, seen, rows.tolist()).to(rows.device)
    estimator = learner.config.loss.keywords()["kl_estimator"]
    return kl_parts(own.logprob[rows], batch.ref_logprobs[chosen], batch.mask[chosen], answer, estimator)


def training_batch(
    learner: Learner, seen: Trajectories, stats: TokenStats, own: TokenStats, selection: Selection
) -> Batch:
    """Return the rollouts that train, with the reference model's scores if there is a KL penalty.

    Rollouts of the momentum model are off-policy. For them, too, the importance ratio and the clip range are relative to the policy at the
    start of the step, and the loss weights each token by policy / momentum model, truncated (decoupled objective: Hilton et al., arXiv
    2110.00641; truncation: IMPALA, arXiv 1802.01561). With the momentum model's log-probs as the old ones, the clip range would be around
    a model that lags by about 1 / (1 - m) steps, and tokens that have changed since would get no gradient. A token that the policy
    generated has weight 1.

    With one optimizer step for a batch, its own forward pass computes the old log-probs, bit for bit. They are computed separately if the
    weights above need them, or if there are more optimizer steps.
    """
    rows = selection.trains.nonzero().squeeze(-1).to(learner.policy.device)
    prompts = [seen.prompts[row] for row in rows.tolist()]
    tokens, mask = seen.rollouts.tokens[rows], seen.rollouts.mask[rows]
    kept = None if seen.rollouts.kept is None else seen.rollouts.kept[rows]
    ref = None
    if learner.reference is not None:
        with learner.reference.swapped_into(learner.policy.model):
            ref = score(
                learner.policy, prompts, tokens, mask, **scoring(learner.config.rollout), stats=("logprob",), kept=kept
            ).logprob
    assert stats.logprob is not None
    assert own.logprob is not None
    weighted = learner.config.method.train_momentum_rollouts
    behaviour = stats.logprob[rows] if weighted else None
    if learner.config.corrects_behaviour:  # the log-probs of the engine, which rounds differently
        behaviour = seen.rollouts.logprobs[rows]
    old = own.logprob[rows] if weighted else None
    if old is None and learner.config.optim.updates_per_batch > 1:
        old = score(
            learner.policy, prompts, tokens, mask, **scoring(learner.config.rollout), stats=("logprob",)
        ).logprob
    sampled = seen.rollouts.logprobs[rows] if engine_scores(learner, seen) else None
    advantages = selection.advantages if selection.token_advantages is None else selection.token_advantages
    advantages = advantages.to(rows.device)[rows]
    if learner.config.loss.top_entropy_share < 1.0:
        assert own.entropy is not None
        by_token = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
        advantages = by_token * highest_entropies(own.entropy[rows], mask, learner.config.loss.top_entropy_share)
    return Batch(prompts, tokens, mask, old, ref, advantages, behaviour, sampled, kept)


def highest_entropies(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """Return the tokens ``(B, R)`` with the highest entropies of all ranks' tokens that train."""
    parts = parallel.all_gather(entropy[mask].cpu())
    keep = top_entropy_mask(torch.cat(parts), share).split([part.numel() for part in parts])[parallel.rank()]
    return torch.zeros_like(mask).masked_scatter(mask, keep.to(mask.device))


def scoring(options: RolloutConfig) -> dict[str, Any]:
    """Return the options of a scoring pass."""
    return {"temperature": options.temperature, "budget": options.tokens_per_microbatch}
