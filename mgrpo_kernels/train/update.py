"""One optimizer step on a batch, in micro-batches."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import linear_policy_loss, linear_token_stats
from mgrpo_kernels.ops.policy_loss import make_options
from mgrpo_kernels.ops.policy_loss.loss_types import LOSSES
from mgrpo_kernels.ops.policy_loss.specs import is_token_level
from mgrpo_kernels.train import parallel
from mgrpo_kernels.train.config import Config, LossConfig, OptimConfig
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.score import ResponseStates, micro_batches, response_states


class Batch(NamedTuple):
    """The B rollouts that train. None of them may be empty."""

    prompts: Sequence[Sequence[int]]
    tokens: Tensor  # (B, R)
    mask: Tensor  # (B, R) bool
    old_logprobs: Tensor | None  # (B, R); None: those of the current policy, which the same forward pass computes
    ref_logprobs: Tensor | None  # (B, R)
    advantages: Tensor  # (B,), or (B, R) where the method weights tokens
    behaviour_logprobs: Tensor | None = None  # (B, R), of the model that generated the rollout, for weights of the loss
    sampled_logprobs: Tensor | None = None  # (B, R), of the rollout engine, for the metric behaviour_mismatch
    kept: Tensor | None = None  # (B, R, K), what a truncated sampler kept for each token; None: the whole vocabulary


class NotFiniteError(FloatingPointError):
    """The loss or gradient of a step is not finite. The weights are unchanged, so the step can be skipped."""

    def __init__(self, text: str, batch: Batch) -> None:
        super().__init__(text)
        self.batch = batch


def learning_rate(options: OptimConfig, step: int) -> float:
    """Return the learning rate of step `step`, counted from 1. It depends only on the step, so resuming needs no saved state."""
    peak, warmup, steps = options.learning_rate, options.warmup_steps, options.steps
    if step <= warmup:
        return peak * step / warmup
    if options.lr_schedule == "constant":
        return peak
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - 1 - warmup) / (steps - warmup)))


def make_optimizer(policy: Policy, options: OptimConfig) -> torch.optim.Optimizer:
    """Return AdamW for the parameters of the policy that train."""
    return torch.optim.AdamW(
        [parameter for parameter in policy.model.parameters() if parameter.requires_grad],
        lr=options.learning_rate,
        betas=options.adam_betas,
        weight_decay=options.weight_decay,
        fused=True,
    )


def accumulate_gradient(
    policy: Policy,
    batch: Batch,
    loss: LossConfig,
    *,
    max_tokens: int,
    temperature: float,
    budget: int,
    tolerance: float = 0.0,
) -> dict[str, float]:
    """Add the gradient of the batch's loss to the parameters; return the loss and the sums of its metrics.

    The loss of every micro-batch is divided by the count of the whole batch, so the split into micro-batches changes only rounding.
    Rollouts without a gradient are counted, but do not pass through the model; `forward_tokens` are those of the others.

    Args:
        policy: model that trains.
        batch: rollouts that train.
        loss: options of the loss.
        max_tokens: maximum length of a response, by which dr_grpo divides.
        temperature: divisor of the logits.
        budget: largest number of tokens in one forward pass.
        tolerance: share of each token's logit gradient that may be left out; 0 for none.
    """
    lengths = batch.mask.sum(-1).tolist()
    options = loss.keywords() if batch.ref_logprobs is not None else loss.keywords() | {"kl_coef": 0.0}
    with_gradient_of = tokens_with_gradient(batch, options)
    live = rows_with_gradient(with_gradient_of)
    tokens, sequences, with_gradient, passed = map(
        int, parallel.total(sum(lengths), len(lengths), len(live), sum(lengths[row] for row in live))
    )
    normalizer = LOSSES[loss.loss_type].normalizer(tokens, sequences, max_tokens)
    sums: dict[str, Tensor] = {}
    mismatch: dict[str, Tensor] = {}
    for rows in _live_micro_batches(policy, batch, live, lengths, budget):
        if not rows:  # another rank has more micro-batches
            parallel.idle_pass(policy)
            continue
        chosen = torch.tensor(rows, device=batch.tokens.device)
        mask, advantages = batch.mask[chosen], batch.advantages[chosen]
        part = functools.partial(_tokens_of, chosen=chosen, mask=mask)
        with policy.autocast():
            packed = response_states(policy, [batch.prompts[row] for row in rows], batch.tokens[chosen], mask)
            weight, bias = policy.head()
            result = linear_policy_loss(
                packed.hidden,
                weight,
                packed.labels,
                part(batch.old_logprobs),
                advantages if advantages.dim() == 1 else advantages[mask],
                bias=bias,
                cu_seqlens=packed.cu_seqlens,
                tokens_with_gradient=sum(with_gradient_of[row] for row in rows),
                temperature=temperature,
                kept=part(batch.kept),
                gradient_tolerance=tolerance or None,
                ref_logprobs=part(batch.ref_logprobs),
                behaviour_logprobs=part(batch.behaviour_logprobs),
                normalizer=normalizer,
                entropy_normalizer=tokens,
                **policy.head_options._asdict(),
                **options,
            )
            # Only for the first micro-batch, because another pass of the head costs a quarter of its work.
            if batch.sampled_logprobs is not None and not mismatch:
                sampled = batch.sampled_logprobs[chosen][mask]
                mismatch = compare(policy, packed, sampled, temperature, part(batch.kept))
        result.loss.backward()
        for name, value in {"loss": result.loss.detach(), **result.metrics}.items():
            sums[name] = sums[name] + value if name in sums else value
    found = {name: value for name, value in (sums | mismatch).items() if name != "ratio_max"}
    numbers = torch.stack(list(found.values())).tolist() if found else []  # one host sync for all
    counts = {"tokens": tokens, "sequences": sequences, "with_gradient": with_gradient, "forward_tokens": passed}
    return parallel.added(dict(zip(found, numbers, strict=True))) | counts


def _live_micro_batches(
    policy: Policy, batch: Batch, live: list[int], lengths: list[int], budget: int
) -> list[list[int]]:
    """Return the rows of each micro-batch, as many on every rank: an empty one is another rank's."""
    of_live = [batch.prompts[row] for row in live], [lengths[row] for row in live]
    batches = [
        [live[each] for each in rows] for rows in micro_batches(*of_live, budget, packed=policy.unpackable is None)
    ]
    return [*batches, *([[]] * (int(parallel.largest(len(batches))) - len(batches)))]


def _tokens_of(values: Tensor | None, *, chosen: Tensor, mask: Tensor) -> Tensor | None:
    """Return the tokens of the chosen rows, packed."""
    return None if values is None else values[chosen][mask]


def tokens_with_gradient(batch: Batch, options: dict[str, Any]) -> list[int]:
    """Return how many tokens of each rollout the loss has a gradient for.

    Without KL penalty and entropy bonus these are the tokens whose advantage is not 0 or, where the loss weighs whole sequences, all
    tokens of a rollout that has one.
    """
    lengths = batch.mask.sum(-1)
    if options["kl_coef"] != 0 or options["entropy_coef"] != 0:
        return lengths.tolist()
    counts = ((batch.advantages.reshape(len(lengths), -1) != 0) & batch.mask).sum(-1) if len(lengths) else lengths
    if not is_token_level(make_options("policy_loss", options), batch.behaviour_logprobs):
        counts = torch.where(counts > 0, lengths, 0)
    return counts.tolist()


def rows_with_gradient(counts: Sequence[int]) -> list[int]:
    """Return the rollouts with a token that has a gradient.

    At least one, so that every parameter has a gradient, of 0, and the optimizer's step is the same.
    """
    return [row for row, count in enumerate(counts) if count] or list(range(len(counts)))[:1]


@torch.no_grad()
def compare(
    policy: Policy, packed: ResponseStates, sampled: Tensor, temperature: float, kept: Tensor | None
) -> dict[str, Tensor]:
    """Compare the policy's log-probs with those of the engine, ``(N,)``; return the sum of |differences| and their number."""
    weight, bias = policy.head()
    own = linear_token_stats(
        packed.hidden,
        weight,
        packed.labels,
        bias=bias,
        stats=("logprob",),
        temperature=temperature,
        kept=kept,
        **policy.head_options._asdict(),
    )
    assert own.logprob is not None
    difference = (own.logprob - sampled).abs()
    return {"mismatch_sum": difference.sum(), "mismatch_tokens": torch.ones_like(difference).sum()}


def take_step(
    policy: Policy, optimizer: torch.optim.Optimizer, batch: Batch, config: Config, step: int
) -> dict[str, Any]:
    """Take the optimizer steps of a batch, one after the other; return the metrics of the update, as means over them.

    Raises:
        NotFiniteError: the loss or the gradient of one of them is not finite. The weights are then those before that one.
    """
    passes = [
        take_optimizer_step(
            policy, optimizer, batch if number == 0 else batch._replace(sampled_logprobs=None), config, step
        )
        for number in range(config.optim.updates_per_batch)
    ]
    return {
        name: None
        if value is None
        else math.fsum(each[name] for each in passes if name in each) / sum(name in each for each in passes)
        for name, value in passes[0].items()
    }


def take_optimizer_step(
    policy: Policy, optimizer: torch.optim.Optimizer, batch: Batch, config: Config, step: int
) -> dict[str, Any]:
    """Take one optimizer step; return the metrics of the update.

    Raises:
        NotFiniteError: the loss or the gradient is not finite. The weights are then unchanged.
    """
    optimizer.zero_grad(set_to_none=True)
    sums = accumulate_gradient(
        policy,
        batch,
        config.loss,
        max_tokens=config.rollout.max_response_tokens,
        temperature=config.rollout.temperature,
        budget=config.rollout.tokens_per_microbatch,
        tolerance=config.optim.gradient_tolerance,
    )
    norm = float(parallel.whole(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.optim.max_grad_norm)))
    if not (math.isfinite(sums["loss"]) and math.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        raise NotFiniteError(
            f"update: expected a finite loss and gradient, got loss {sums['loss']} and gradient norm {norm}", batch
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config.optim, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    metrics = {
        "loss": sums["loss"],
        "grad_norm": norm,
        "gradient_share": sums["with_gradient"] / sums["sequences"],
        "kl": None if batch.ref_logprobs is None else sums["kl_sum"] / sums["tokens"],
        "clip_fraction": (sums["clip_low_count"] + sums["clip_high_count"]) / sums["tokens"],
    }
    if batch.behaviour_logprobs is not None or config.loss.off_policy_delta is not None:
        metrics["masked_fraction"] = sums["masked_count"] / sums["forward_tokens"]  # the others' masks are not known
    if batch.sampled_logprobs is not None:
        metrics["behaviour_mismatch"] = sums["mismatch_sum"] / sums["mismatch_tokens"]
    return metrics
