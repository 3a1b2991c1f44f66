"""The losses of TRL's GRPOTrainer, GMPOTrainer and RLOOTrainer, computed by :func:`policy_loss`; TRL's metrics beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import policy_loss
from mgrpo_kernels.integrations import Patch
from mgrpo_kernels.ops.policy_loss.loss_types import CISPO, CLIP, GMPO, LOSSES, TOKENS, VESPO

_IMAGES = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
SCORING = (
    "self",
    "model",
    "input_ids",
    "attention_mask",
    "logits_to_keep",
    "batch_size",
    "compute_entropy",
    "compute_aux_loss",
    *_IMAGES,
)
"""What ``_get_per_token_logps_and_entropies`` takes."""

LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "vespo", "luspo")
"""What GRPOTrainer's ``loss_type`` may be."""
WITH_GMPO = (*LOSS_TYPES, "gmpo")
"""What MGRPOTrainer's may be. TRL has a trainer of its own for gmpo."""

_OVER_GENERATION_BATCH = tuple(name for name, row in LOSSES.items() if row.counts == TOKENS and name != "bnpo")
"""Losses that TRL divides by the tokens of the whole generation batch; bnpo counts those of the micro-batch."""
_NO_CAP = 1e30  # TRL's own cap has been applied before, or there is none


def unsupported(trainer: Any, loss_types: Sequence[str] = LOSS_TYPES) -> str | None:
    """Return why the fused loss cannot do what the configuration of a GRPOTrainer asks for, or None."""
    reason = unsupported_gmpo(trainer)
    if reason is not None:
        return reason
    if trainer.use_adaptive_entropy:
        return "the controller of use_adaptive_entropy lives inside that method"
    if trainer.loss_type not in loss_types:
        return f"loss_type {trainer.loss_type!r} is not one of {', '.join(loss_types)}"
    if trainer.loss_type != "gmpo":
        return None
    for name, value, without in (
        ("delta", trainer.args.delta, None),
        ("top_entropy_quantile", trainer.top_entropy_quantile, 1.0),
        ("importance_sampling_level", trainer.importance_sampling_level, "token"),
    ):
        if value != without:
            return f"{name} {value!r} has no effect on loss_type 'gmpo', which needs {without!r}"
    return None


def unsupported_gmpo(trainer: Any) -> str | None:
    """Return why the fused loss cannot do what the configuration of a GMPOTrainer asks for, or None."""
    return unsupported_rloo(trainer) or (f"beta {trainer.beta} is below 0" if trainer.beta < 0 else None)


def unsupported_rloo(trainer: Any) -> str | None:
    """Return why the fused loss cannot do what the configuration of an RLOOTrainer asks for, or None."""
    if not 0 <= trainer.epsilon_low <= 1:
        return f"epsilon {trainer.epsilon_low} is not in [0, 1]"
    if trainer.epsilon_high < 0:
        return f"epsilon_high {trainer.epsilon_high} is below 0"
    return None


def replacement(
    patch: Patch,
    name: str,
    own: Callable[..., Tensor],
    fused: Callable[..., Tensor],
    unsupported: Callable[[Any], str | None],
) -> Callable[..., Tensor]:
    """Return the method that takes the place of `own`; `unsupported` says why `fused` cannot run, or None."""

    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        reason = unsupported(self)
        if reason is None:
            return fused(self, model, inputs)
        patch.fall_back(name, reason)
        return own(self, model, inputs)

    return _compute_loss


class Scored(NamedTuple):
    """A batch under the model that is trained."""

    logprobs: Tensor  # (B, T)
    entropy: Tensor  # (B, T), detached unless there is an entropy bonus
    aux: Tensor | None  # 0-d
    mask: Tensor  # (B, T) bool: tokens that the model sampled


def score(trainer: Any, model: Any, inputs: dict[str, Any]) -> Scored:
    """Run the model over prompts and completions."""
    ids, completion = inputs["completion_ids"], inputs["completion_mask"]
    logprobs, entropy, aux = trainer._get_per_token_logps_and_entropies(
        model,
        torch.cat([inputs["prompt_ids"], ids], dim=1),
        torch.cat([inputs["prompt_mask"], completion], dim=1),
        ids.shape[1],
        compute_entropy=True,
        compute_aux_loss=trainer.aux_loss_enabled,
        **{name: inputs.get(name) for name in _IMAGES},
    )
    mask = completion.bool()
    return Scored(logprobs, entropy, aux, mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask)


def grpo_loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return what ``GRPOTrainer._compute_loss`` returns, 0-d, and log what it logs."""
    args, mode = trainer.args, "train" if trainer.model.training else "eval"
    accumulation = trainer.current_gradient_accumulation_steps if mode == "train" else 1
    logprobs, entropy, aux, mask = score(trainer, model, inputs)
    old = inputs.get("old_per_token_logps")
    quantile = trainer.top_entropy_quantile
    acts = mask if quantile == 1 else trainer.get_high_entropy_mask(entropy, mask, 1 - quantile)
    weights, behaviour = token_weights(trainer, inputs, logprobs, mask, acts)
    # Weights are >= 0 and so may stand on the advantage: min(r A, clip(r) A) w = min(r A w, clip(r) A w).
    advantages = inputs["advantages"]  # (B,) or (B, T)
    weighted = advantages if weights is None else (per_token(advantages) * weights).expand_as(logprobs)
    found = policy_loss(
        logprobs,
        old,
        weighted,
        mask=mask,
        entropy=entropy.detach(),
        ref_logprobs=inputs["ref_per_token_logps"] if trainer.beta != 0 else None,
        behaviour_logprobs=behaviour,
        behaviour_cap=_NO_CAP,
        loss_type=trainer.loss_type,
        importance_level=trainer.importance_sampling_level,
        clip_low=trainer.epsilon_low,
        clip_high=trainer.epsilon_high,
        clip_delta=args.delta,
        cispo_cap=trainer.epsilon_high if trainer.loss_type == "cispo" else _NO_CAP,
        kl_coef=trainer.beta,
        kl_bias_correction=args.use_bias_correction_kl,
        sapo_temperature=(args.sapo_temperature_pos, args.sapo_temperature_neg),
        vespo_k=(args.vespo_k_pos, args.vespo_k_neg),
        vespo_lambda=(args.vespo_lambda_pos, args.vespo_lambda_neg),
        normalizer=normalizer(trainer, inputs, mask),
    )
    loss, log, gather = found.loss, trainer._metrics[mode], trainer.accelerator.gather
    if trainer.entropy_coef != 0:
        scale = 1 if trainer.loss_type in _OVER_GENERATION_BATCH else accumulation
        log["policy_loss"].append(gather(loss.detach() * scale).nanmean().item())
        loss = (
            loss - trainer.entropy_coef * torch.where(acts, entropy, 0.0).sum() / acts.sum().clamp(min=1) / accumulation
        )
        if mode == "train" and trainer.accelerator.sync_gradients:
            log["entropy_coef"].append(trainer.entropy_coef)
    if aux is not None:
        loss = loss + trainer.router_aux_loss_coef * aux / accumulation
        log["aux_loss"].append(trainer.accelerator.gather_for_metrics(aux).mean().item())
    if trainer.beta != 0:
        log["kl"].append(mean(trainer, found.metrics["kl_sum"], found.metrics["tokens"]))
    log["entropy"].append(mean(trainer, found.metrics["entropy_sum"], found.metrics["tokens"]))
    log_ratios(trainer, log, inputs, logprobs.detach(), mask)
    return loss


def gmpo_loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return what ``GMPOTrainer._compute_loss`` returns, 0-d, and log what it logs.

    Like TRL's, it reads no other option of the loss than epsilon, epsilon_high, beta and top_entropy_quantile.
    """
    mode = "train" if trainer.model.training else "eval"
    logprobs, entropy, _, mask = score(trainer, model, inputs)
    quantile = trainer.top_entropy_quantile
    acts = mask if quantile == 1 else trainer.get_high_entropy_mask(entropy, mask, 1 - quantile)
    accumulation = trainer.current_gradient_accumulation_steps if mode == "train" else 1
    rows = torch.full((), len(mask) * accumulation, device=mask.device, dtype=torch.float32)
    loss = policy_loss(
        logprobs,
        inputs.get("old_per_token_logps"),
        inputs["advantages"],
        mask=acts,
        loss_type="gmpo",
        clip_low=trainer.epsilon_low,
        clip_high=trainer.epsilon_high,
        normalizer=rows,
    ).loss
    # TRL's ratio of a completion none of whose tokens acts is 1, a constant; ours has no term for it.
    loss = loss - torch.where(acts.any(1), 0.0, inputs["advantages"]).sum() / rows
    log = trainer._metrics[mode]
    if trainer.beta != 0:  # of all tokens, also those that are left out of the geometric mean
        nothing, reference = torch.zeros_like(inputs["advantages"]), inputs["ref_per_token_logps"]
        penalty = policy_loss(
            logprobs,
            None,
            nothing,
            mask=mask,
            ref_logprobs=reference,
            loss_type="grpo",
            kl_coef=trainer.beta,
            normalizer=rows,
        )
        loss = loss + penalty.loss
        log["kl"].append(mean(trainer, penalty.metrics["kl_sum"], penalty.metrics["tokens"]))
    log["entropy"].append(mean_where(trainer, entropy.detach(), mask))
    log_clipped(trainer, log, clipped_by_log_ratio(trainer, inputs, logprobs.detach(), mask), mask)
    return loss


def token_weights(
    trainer: Any, inputs: dict[str, Any], logprobs: Tensor, mask: Tensor, acts: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return what the surrogate of each token is multiplied by, ``(B, T)`` or ``(B, 1)``, and the sampler's log-probs; None for neither."""
    logprobs = logprobs.detach()
    old = inputs.get("old_per_token_logps")
    old = logprobs if old is None else old
    weights: Tensor | None = None if acts is mask else acts.to(logprobs.dtype)
    if trainer.off_policy_mask_threshold is not None:
        keep = trainer.get_off_policy_mask(
            advantages=per_token(inputs["advantages"]),
            per_token_logps=logprobs,
            sampling_per_token_logps=inputs.get("sampling_per_token_logps", old),
            mask=mask.long(),
            off_policy_threshold=trainer.off_policy_mask_threshold,
        )
        weights = keep.to(logprobs.dtype) if weights is None else weights * keep
    if not (trainer.use_vllm and trainer.vllm_importance_sampling_correction):
        return weights, None
    ratio = inputs["importance_sampling_ratio"]  # (B, T) or (B, 1): policy / sampler, which TRL has truncated already
    if LOSSES[trainer.loss_type].surrogate.weighs_behaviour:  # there it is a part of the sequence's own weight
        return weights, old - ratio.log()
    return ratio if weights is None else weights * ratio, None


def per_token(advantages: Tensor) -> Tensor:
    """Return advantages that multiply ``(B, T)``."""
    return advantages.unsqueeze(1) if advantages.dim() == 1 else advantages


def normalizer(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """Return what a micro-batch's loss is divided by, 0-d: TRL's choice for each loss type.

    ``sequences_in_batch``, where the inputs have it, says how many sequences of the whole generation batch train; TRL itself counts the
    micro-batch's rows.
    """
    training, loss_type = trainer.model.training, trainer.loss_type
    accumulation = trainer.current_gradient_accumulation_steps if training else 1

    def share_of(count: Tensor) -> Tensor:  # of the generation batch, for a micro-batch of an accumulation window
        share: Tensor = count.clamp(min=1.0) / trainer.accelerator.num_processes
        if training:
            share = share * accumulation / trainer.args.steps_per_generation
        return share

    if loss_type in _OVER_GENERATION_BATCH:
        return share_of(inputs["num_items_in_batch"])
    if loss_type == "bnpo":
        return mask.sum().clamp(min=1) * accumulation
    if "sequences_in_batch" in inputs:
        sequences = share_of(inputs["sequences_in_batch"])
    else:
        sequences = torch.full((), mask.shape[0] * accumulation, device=mask.device, dtype=torch.float32)
    divisor: Tensor = LOSSES[loss_type].normalizer(None, sequences, trainer.max_completion_length)
    return divisor


def log_ratios(trainer: Any, log: Any, inputs: dict[str, Any], logprobs: Tensor, mask: Tensor) -> None:
    """Log how often the importance ratio was clipped, under TRL's names."""
    old, advantages = inputs.get("old_per_token_logps"), per_token(inputs["advantages"])
    log_ratio = torch.zeros_like(logprobs) if old is None else torch.where(mask, logprobs - old, 0.0)
    surrogate = LOSSES[trainer.loss_type].surrogate
    if surrogate is VESPO:
        args = trainer.args
        gamma = trainer.get_gamma_weights(
            advantages=advantages,
            log_ratio_per_token=log_ratio,
            mask=mask,
            importance_sampling_ratio=inputs.get("importance_sampling_ratio"),
            k_pos=args.vespo_k_pos,
            lambda_pos=args.vespo_lambda_pos,
            k_neg=args.vespo_k_neg,
            lambda_neg=args.vespo_lambda_neg,
        )
        log["vespo/phi_seq_mean"].append(mean_where(trainer, gamma, mask))
        return
    if surrogate is GMPO:
        log_clipped(trainer, log, clipped_by_log_ratio(trainer, inputs, logprobs, mask), mask)
        return
    if trainer.importance_sampling_level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    ratio = log_ratio.exp()
    if surrogate is CISPO:
        log["cispo_clip_ratio"].append(mean_where(trainer, (ratio > trainer.epsilon_high) & (advantages > 0), mask))
    if surrogate is not CLIP:
        return
    if trainer.args.delta is not None:
        ratio = ratio.clamp(max=trainer.args.delta)
    low = (ratio < 1 - trainer.epsilon_low) & (advantages < 0)
    high = (ratio > 1 + trainer.epsilon_high) & (advantages > 0)
    log_clipped(trainer, log, (low, high), mask)


def clipped_by_log_ratio(trainer: Any, inputs: dict[str, Any], logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return which tokens gmpo clips from below and from above, ``(B, T)`` each."""
    old, advantages = inputs.get("old_per_token_logps"), per_token(inputs["advantages"])
    log_ratio = torch.zeros_like(logprobs) if old is None else torch.where(mask, logprobs - old, 0.0)
    return (log_ratio < -trainer.epsilon_low) & (advantages < 0), (log_ratio > trainer.epsilon_high) & (advantages > 0)


def log_clipped(trainer: Any, log: Any, clipped: tuple[Tensor, Tensor], mask: Tensor) -> None:
    """Log the shares of what was clipped from below and from above, under TRL's names."""
    low, high = clipped
    for name, each in (("low", low), ("high", high), ("region", low | high)):
        log[f"clip_ratio/{name}_mean"].append(mean_where(trainer, each, mask))
    for name, each, extreme in (("low_min", low, torch.amin), ("high_max", high, torch.amax)):
        where = counted(each, mask)
        shares = trainer.accelerator.gather((each & where).sum(1) / where.sum(1))  # NaN for an empty completion
        shares = shares[~shares.isnan()]
        log[f"clip_ratio/{name}"].append(extreme(shares, 0).item() if shares.numel() else float("nan"))


def counted(values: Tensor, mask: Tensor) -> Tensor:
    """Return which of `values`, ``(B, T)`` or one a sequence ``(B, 1)``, count."""
    return mask if values.shape[1] == mask.shape[1] else torch.ones_like(values, dtype=torch.bool)


def mean_where(trainer: Any, values: Tensor, mask: Tensor) -> float:
    """Return the mean over the tokens of every process, or over sequences where there is one value for each."""
    where = counted(values, mask)
    return mean(trainer, torch.where(where, values.float(), 0.0).sum(), where.sum().float())


def mean(trainer: Any, total: Tensor, count: Tensor) -> float:
    """Return sum / count over every process."""
    total, count = trainer.accelerator.reduce(torch.stack([total, count]), reduction="sum")
    return (total / count.clamp(min=1)).item()


def rloo_loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return what ``RLOOTrainer._compute_loss`` returns, 0-d, and log what it logs.

    Its ratio is that of whole completions, exp(sum of log-probs - sum of old ones): the clipped loss of sequences of one token each.
    """
    logprobs, entropy, aux, mask = score(trainer, model, inputs)
    total, old = torch.where(mask, logprobs, 0.0).sum(1, keepdim=True), inputs["old_logps"].unsqueeze(1)  # (B, 1)
    advantages = inputs["advantages"]  # (B,)
    loss = policy_loss(
        total, old, advantages, loss_type="grpo", clip_low=trainer.epsilon_low, clip_high=trainer.epsilon_high
    ).loss
    log = trainer._metrics["train" if trainer.model.training else "eval"]
    if aux is not None:
        loss = loss + trainer.router_aux_loss_coef * aux
        log["aux_loss"].append(trainer.accelerator.gather_for_metrics(aux).mean().item())
    log["entropy"].append(mean_where(trainer, entropy.detach(), mask))
    ratio = (total.detach() - old).exp().squeeze(1)
    low = (ratio < 1 - trainer.epsilon_low) & (advantages < 0)
    high = (ratio > 1 + trainer.epsilon_high) & (advantages > 0)
    for name, clipped in (("low", low), ("high", high), ("region", low | high)):
        gathered = trainer.accelerator.gather(clipped.float())
        log[f"clip_ratio/{name}_mean"].append(gathered.mean().item())
        if name != "region":
            log[f"clip_ratio/{name}_{'min' if name == 'low' else 'max'}"].append(
                (gathered.amin() if name == "low" else gathered.amax()).item()
            )
    return loss
