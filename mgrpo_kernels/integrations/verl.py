"""verl 0.9: the fused head in place of its kernel, and its clipped policy loss and those of DPPO fused.

:func:`patched` puts them under verl's own names. verl does it by itself where this package is installed beside it
(:mod:`mgrpo_kernels.integrations.verl_plugin`); M-GRPO's filter and vote are a trainer of its own
(:mod:`mgrpo_kernels.integrations.verl_trainer`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mgrpo_kernels import checks
from mgrpo_kernels.integrations import Patch
from mgrpo_kernels.integrations.guard import CollapseError, GuardHook
from mgrpo_kernels.ops.linear_token_stats import linear_token_stats
from mgrpo_kernels.ops.policy_loss import policy_loss
from mgrpo_kernels.ops.policy_loss.loss_types import LOSSES, SEQUENCE_MEAN

INSTALL = "pip install 'verl==0.9.*'"
LOSS = "mgrpo_kernels"
"""Name of the loss in verl's registry: actor_rollout_ref.actor.policy_loss.loss_mode."""
DPPO = ("dppo_tv", "dppo_kl")
"""verl's losses of arXiv 2602.04879; here ``mgrpo_kernels_dppo_tv`` and ``mgrpo_kernels_dppo_kl``."""

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
REDUCTIONS = ("none", "sum", "mean")

_KERNEL = "verl.utils.kernel.linear_cross_entropy"
_LOSSES = "verl.trainer.ppo.core_algos"
# These bind the head's name when they are imported, which takes Megatron.
_BOUND_AT_IMPORT = ("verl.models.mcore.model_forward_fused", "verl.models.mcore.model_forward_1f1b_overlap")
_LOSS_PARAMETERS = (
    "old_log_prob",
    "log_prob",
    "advantages",
    "response_mask",
    "loss_agg_mode",
    "config",
    "rollout_is_weights",
)


def guarded(hook: GuardHook) -> Patch:
    """Show the collapse guard what verl logs after each step, until ``undo()`` or the end of a ``with`` block.

    It reads ``verl.utils.tracking.Tracking.log``, through which every trainer of verl logs, in the process of the trainer (with Ray that of
    its TaskRunner). The line is logged first. Its names are ``mgrpo/...`` with this library's trainer, ``actor/entropy``, and with
    ``GuardHook(gold=True)`` ``critic/score/mean``; ``accuracy`` names a figure such as ``val-core/gsm8k/acc/mean@8``.

    Args:
        hook: says what happens at signs of collapse. With ``stop`` it raises :class:`CollapseError` out of verl's loop, after verl's own
            checkpoint of that step if one is due; the run is resumed from its last checkpoint.

    Raises:
        IntegrationError: verl is not installed, or logs in another way.
    """
    patch = Patch("verl", install=INSTALL)
    own = patch.original("verl.utils.tracking", "Tracking.log")

    def log(self: Any, data: Any, step: int, backend: Any = None) -> None:
        own(self, data=data, step=step, backend=backend)
        signs = hook(step, data)
        if signs and hook.action == "stop":
            raise CollapseError(
                f"collapse guard, step {step}: {'; '.join(signs)}; resume from the last checkpoint with other options"
            )

    patch.replace("verl.utils.tracking", "Tracking.log", log, parameters=("self", "data", "step", "backend"))
    return patch.apply()


def patched(strict: bool = False, *, vanilla: bool = True) -> Patch:
    """Put the fused head and loss under verl's names, until ``undo()`` or the end of a ``with`` block.

    ===============================================================  ====================================================
    verl.utils.kernel.linear_cross_entropy.linear_cross_entropy      :func:`linear_cross_entropy` (impl_backend triton)
    verl.utils.experimental.torch_functional.FusedLinearForPPO       the same (impl_backend torch and liger)
    the policy losses' registry, under "mgrpo_kernels"               verl's clipped loss, one launch forward and backward
    the same, under "mgrpo_kernels_dppo_tv" and "..._dppo_kl"        verl's losses of DPPO
    compute_policy_loss_vanilla, and "vanilla" in the registry       the clipped loss, with `vanilla`
    compute_policy_loss_dppo_tv and _kl, and "dppo_tv", "dppo_kl"    those of DPPO, with `vanilla`
    ===============================================================  ====================================================

    verl calls a head of its own only where actor_rollout_ref.model.use_fused_kernels is set.

    Args:
        strict: raise IntegrationError where the loss would run verl's own code: clip_ratio_c below 1 + clip_ratio_high.
        vanilla: replace verl's own losses too, so that no configuration changes.

    Raises:
        IntegrationError: verl is not installed, or has moved one of these names.
    """
    patch = _VerlPatch("verl", install=INSTALL, strict=strict)
    patch.replace(_KERNEL, "linear_cross_entropy", linear_cross_entropy)
    for module in _BOUND_AT_IMPORT:
        if module in sys.modules:
            patch.replace(module, "linear_cross_entropy", linear_cross_entropy)
    patch.replace(
        "verl.utils.experimental.torch_functional",
        "FusedLinearForPPO.forward",
        _fused_linear_for_ppo,
        parameters=("self", "hidden_states", "vocab_weights", "input_ids", "temperature"),
    )
    own = patch.original(_LOSSES, "compute_policy_loss_vanilla")
    loss = _policy_loss(patch, own)
    patch.registry = patch.original(_LOSSES, "POLICY_LOSS_REGISTRY")
    patch.losses = {LOSS: loss}
    verls = {"vanilla": loss}
    for kind in DPPO:
        patch.losses[f"{LOSS}_{kind}"] = verls[kind] = _dppo_loss(kind)
    if vanilla:
        for name, each in verls.items():
            patch.replace(_LOSSES, f"compute_policy_loss_{name}", each, parameters=_LOSS_PARAMETERS)
        patch.losses |= verls
    return patch.apply()


class _VerlPatch(Patch):
    """A patch that also enters losses into verl's registry, and finds the modules that have bound the head since."""

    registry: dict[str, Any]
    losses: dict[str, Any]

    def apply(self) -> _VerlPatch:
        super().apply()
        self._before = {name: self.registry[name] for name in self.losses if name in self.registry}
        self._head = self._replacements[0].original
        self.registry.update(self.losses)
        return self

    def undo(self) -> None:
        if not self._applied:
            return
        super().undo()
        for name, loss in self.losses.items():
            if self.registry.get(name) is loss:  # else somebody has registered another since
                del self.registry[name]
                if name in self._before:
                    self.registry[name] = self._before[name]
        for module in _BOUND_AT_IMPORT:
            if vars(sys.modules.get(module, object)).get("linear_cross_entropy") is linear_cross_entropy:
                sys.modules[module].linear_cross_entropy = self._head  # type: ignore[attr-defined]


class _ShareOfGradient(torch.autograd.Function):
    """The identity, whose gradient is this rank's share of it.

    verl's kernel leaves the sum over the vocabulary's ranks to its caller: under sequence parallelism Megatron sums them
    where the sequence is scattered. :func:`linear_token_stats` has summed already, so each rank gives 1 / ranks of it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.ranks, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probs of the labels, and entropies, of softmax(hidden @ weight.T / temperature), without the logits.

    A replacement of ``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy``, whose results are flat whatever the labels' shape.

    Args:
        hidden: ``(..., H)``, labels' shape before H; axes of length 1 may stand elsewhere, as in Megatron's ``(N, 1, H)``.
        weight: ``(V, H)``; with a process group of more than one rank, this rank's equal share of the vocabulary.
        labels: ``(...)`` int32 or int64, already shifted, over the whole vocabulary.
        temperature: a number > 0, or a tensor that broadcasts to labels.
        reduction: of the log-probs: "none", "sum" or "mean".
        dist_process_group: over which the vocabulary is sharded. The gradient of hidden is then this rank's share: the ranks'
            shares add up to it, as those of verl's kernel do.

    Returns:
        log-probs, ``(N,)`` for N labels, or 0-d with a reduction; and entropies, ``(N,)``; float32. Either may be left without gradient.

    Raises:
        TypeError, ValueError: as :func:`linear_token_stats` does.
    """
    checks.check_tensor("hidden", hidden)
    checks.check_tensor("labels", labels, dtypes=checks.INTS)
    reduction = checks.check_choice("reduction", reduction.lower(), REDUCTIONS)
    if [n for n in hidden.shape[:-1] if n != 1] != [n for n in labels.shape if n != 1]:
        raise ValueError(
            f"labels: expected hidden's shape {checks.shape_text(hidden.shape)} without its last axis, "
            f"got {checks.shape_text(labels.shape)}"
        )
    hidden = hidden.reshape(*labels.shape, hidden.shape[-1])
    group, vocab_start = dist_process_group, None
    ranks = 1 if group is None else dist.get_world_size(group)
    if ranks > 1:
        hidden = _ShareOfGradient.apply(hidden, ranks)
        vocab_start = dist.get_rank(group) * weight.shape[0]
    stats = linear_token_stats(
        hidden, weight, labels, temperature=temperature, tp_group=group if ranks > 1 else None, vocab_start=vocab_start
    )
    assert stats.logprob is not None
    assert stats.entropy is not None
    logprob, entropy = stats.logprob.reshape(-1), stats.entropy.reshape(-1)
    if reduction != "none":
        logprob = logprob.sum() if reduction == "sum" else logprob.mean()
    return logprob, entropy


def _fused_linear_for_ppo(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """Do what verl's ``FusedLinearForPPO.forward`` does: its results have the shape of `input_ids`."""
    logprob, entropy = linear_cross_entropy(hidden_states, vocab_weights, input_ids, temperature)
    return logprob.view(input_ids.shape), entropy.view(input_ids.shape)


def _policy_loss(patch: Patch, own: Callable[..., Any]) -> Callable[..., Any]:
    """Return verl's clipped loss, fused; `own` is verl's, for what is not."""

    def loss(
        old_log_prob: Tensor,  # (B, L)
        log_prob: Tensor,  # (B, L)
        advantages: Tensor,  # (B, L)
        response_mask: Tensor,  # (B, L)
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,  # (B, L)
    ) -> tuple[Tensor, dict[str, Any]]:
        low, high = _bounds(config)
        most = config.get("clip_ratio_c", 3.0)
        if most < 1.0 + high:
            patch.fall_back(LOSS, f"expected clip_ratio_c >= 1 + clip_ratio_high = {1.0 + high:g}, got {most:g}")
            plain: tuple[Tensor, dict[str, Any]] = own(
                old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
            )
            return plain
        mask = response_mask.bool()
        loss_type, normalizer = aggregation(loss_agg_mode, mask, config.global_batch_info)
        weighted = _weighted(advantages, rollout_is_weights)
        value = policy_loss(
            log_prob,
            old_log_prob,
            weighted,
            mask=mask,
            loss_type=loss_type,
            clip_low=low,
            clip_high=high,
            clip_delta=most,
            normalizer=normalizer,
        ).loss
        new, down = log_prob.detach(), advantages < 0
        ratio = (new - old_log_prob).exp()
        clipped = ((advantages > 0) & (ratio > 1.0 + high)) | (down & (ratio < 1.0 - low))
        return value, _metrics(new, old_log_prob, mask, clipped, down, most)

    return loss


def _dppo_loss(kind: str) -> Callable[..., Any]:
    """Return verl's loss `kind`, fused: the clip ratios are bounds of the divergence, and clip_ratio_c is the largest weight."""

    def loss(
        old_log_prob: Tensor,  # (B, L)
        log_prob: Tensor,  # (B, L)
        advantages: Tensor,  # (B, L)
        response_mask: Tensor,  # (B, L)
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,  # (B, L)
    ) -> tuple[Tensor, dict[str, Any]]:
        low, high = _bounds(config)
        bounds = (high, low)  # of a rise and of a fall
        most, mask = config.get("clip_ratio_c", 20.0), response_mask.bool()
        loss_type, normalizer = aggregation(loss_agg_mode, mask, config.global_batch_info)
        weighted = _weighted(advantages, rollout_is_weights)
        if LOSSES[loss_type].share == SEQUENCE_MEAN:
            weighted = weighted / mask.sum(-1, keepdim=True).clamp(min=1)
        value = policy_loss(
            log_prob,
            old_log_prob,
            weighted,
            mask=mask,
            loss_type=kind,
            dppo_cap=most,
            normalizer=normalizer,
            dppo_tv_bounds=bounds,  # the loss reads those of its kind
            dppo_kl_bounds=bounds,
        ).loss
        new = log_prob.detach()
        moved = _moved_too_far(kind, new, old_log_prob, advantages, low, high)
        return value, _metrics(new, old_log_prob, mask, moved, ~moved, most)

    return loss


def _moved_too_far(kind: str, new: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Return the tokens that verl's DPPO masks, ``(B, L)`` bool; without an advantage they count as with a negative one."""
    p, q = new.exp(), old.exp()
    if kind == "dppo_tv":
        return torch.where(advantages > 0, p - q > high, q - p > low)
    divergence = q * (old - new) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
    return torch.where(advantages > 0, (divergence > high) & (p > q), (divergence > low) & (p < q))


def _weighted(advantages: Tensor, weights: Tensor | None) -> Tensor:
    """Return the advantages with the weights, which are never negative: they scale a surrogate whichever bound it has."""
    return advantages if weights is None else advantages * weights


def _bounds(config: Any) -> tuple[float, float]:
    """Return verl's clip ratios, low and high."""
    if config is None:
        raise ValueError("config: expected verl's ActorConfig, got None")
    low, high = (
        config.clip_ratio if bound is None else bound for bound in (config.clip_ratio_low, config.clip_ratio_high)
    )
    return low, high


def aggregation(mode: str, mask: Tensor, batch: dict[str, Any]) -> tuple[str, Tensor]:
    """Return the loss type and the normalizer, 0-d, that make :func:`policy_loss` aggregate as verl's ``agg_loss`` does.

    Args:
        mode: one of :data:`AGGREGATIONS`.
        mask: ``(B, L)`` bool.
        batch: verl's global_batch_info: dp_size, batch_num_tokens, global_batch_size, loss_scale_factor.

    Raises:
        ValueError: no such mode, or more than one data-parallel rank and the whole batch's count is missing.
    """
    checks.check_choice("loss_agg_mode", mode, AGGREGATIONS)
    ranks = batch.get("dp_size") or 1

    def whole(name: str, here: Callable[[], Tensor]) -> Tensor:
        count = batch.get(name)
        if count is None:
            if ranks > 1:
                raise ValueError(f"{name}: expected the whole batch's count with dp_size {ranks}, got None")
            return here().float()
        return torch.as_tensor(count, dtype=torch.float32, device=mask.device)

    if mode == "token-mean":
        return "bnpo", whole("batch_num_tokens", mask.sum) / ranks
    if mode == "token-sum":
        return "bnpo", torch.full((), 1.0 / ranks, device=mask.device, dtype=torch.float32)
    sequences = whole("global_batch_size", lambda: mask.any(-1).sum()) / ranks
    if mode == "seq-mean-token-mean":
        return "grpo", sequences
    if mode == "seq-mean-token-sum-norm":
        sequences = sequences * (batch.get("loss_scale_factor") or mask.shape[-1])
    return "luspo", sequences


def _metrics(
    log_prob: Tensor, old: Tensor, mask: Tensor, clipped: Tensor, capped: Tensor, most: float
) -> dict[str, float]:
    """Return what verl logs of a loss: means over the response's tokens, with one host sync for the three.

    `clipped` ``(B, L)`` bool are the tokens without a gradient, `capped` those whose ratio counts as too large above `most`.
    """
    gap = torch.where(mask, log_prob - old, 0.0).clamp(-20.0, 20.0)
    sums = [(mask & clipped).sum().float(), -gap.sum(), (mask & capped & (gap.exp() > most)).sum().float()]
    names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    return dict(zip(names, (torch.stack(sums) / mask.sum().clamp(min=1)).tolist(), strict=True))


__all__ = ["DPPO", "LOSS", "aggregation", "linear_cross_entropy", "patched"]
