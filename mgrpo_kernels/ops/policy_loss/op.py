"""The custom ops of advantages and policy loss: their arguments by name, their fakes and their autograd formula."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels import backend as backends
from mgrpo_kernels import checks, sequences
from mgrpo_kernels.ops import _autograd
from mgrpo_kernels.ops._schema import Schema
from mgrpo_kernels.ops._statistics import statistics_dtype
from mgrpo_kernels.ops.policy_loss import direct, native, options, reference, triton
from mgrpo_kernels.ops.policy_loss.gradients import gradients, policy_loss_backward_op
from mgrpo_kernels.ops.policy_loss.options import LossOptions
from mgrpo_kernels.ops.policy_loss.specs import BASELINES, METRICS, SCALES, Groups, PolicyLoss, Tokens

OP = "policy_loss"
backends.register(OP, reference=reference, native=native, triton=triton)

_TOKENS = {
    "logprob": "Tensor",  # (T,)
    "old": "Tensor?",  # (T,)
    "advantages": "Tensor?",  # (T,) or (B,)
    "mask": "Tensor?",  # (T,)
    "offsets": "Tensor",  # (B+1,) int64
    "ref": "Tensor?",  # (T,)
    "entropy": "Tensor?",  # (T,)
    "behaviour": "Tensor?",  # (T,)
    "normalizer": "Tensor?",  # 0-d
    "entropy_normalizer": "Tensor?",  # 0-d
}
_GROUPS = {
    "rewards": "Tensor?",  # (B,); None: there are no groups
    "group_offsets": "Tensor?",  # (P+1,)
    "rollout_mask": "Tensor?",  # (B,)
}
_ARGUMENTS = _TOKENS | _GROUPS | options.SCHEMA
_RETURNS = "(Tensor, Tensor, Tensor, Tensor)"
PACKED = Schema(_ARGUMENTS, _RETURNS)
"""What the loss's op takes, all but the backend."""
CALL = Schema(_ARGUMENTS | {"backend": "str"}, _RETURNS)
"""What the loss's op takes."""


def run(tokens: Tokens, groups: Groups | None, form: LossOptions, backend: str) -> PolicyLoss:
    """Return the loss of checked inputs on the backend that :func:`mgrpo_kernels.backend.choose` has picked."""
    if backend == "native" and direct.applies(tokens, groups):
        loss, metrics = direct.forward(tokens, groups, form)
    else:
        loss, metrics, _, _ = policy_loss_op(*pack(tokens, groups, form), backend)
    return PolicyLoss(loss, dict(zip(METRICS, metrics.unbind(), strict=True)))


def pack(tokens: Tokens, groups: Groups | None, form: LossOptions) -> tuple[Any, ...]:
    """Return the three records as the custom op's arguments, all but the backend."""
    of_groups: dict[str, Tensor | None] = dict.fromkeys(_GROUPS)
    numbers, names = {"eps": 0.0}, {"baseline": BASELINES[0], "scale": SCALES[0]}
    if groups is not None:
        of_groups = {"rewards": groups.rewards, "group_offsets": groups.offsets, "rollout_mask": groups.mask}
        numbers, names = {"eps": groups.eps}, {"baseline": groups.baseline, "scale": groups.scale}
    settings = options.to_arguments(form, numbers, names)
    return PACKED.pack(token_arguments(tokens) | of_groups | settings)


def unpack(given: Mapping[str, Any]) -> tuple[Tokens, Groups | None, LossOptions]:
    """Return what :func:`pack` was given, from the op's arguments by name."""
    form, others = options.from_arguments(given, numbers=("eps",), names=("baseline", "scale"))
    groups = None
    if given["rewards"] is not None:
        groups = Groups(
            rewards=given["rewards"],
            offsets=given["group_offsets"],
            mask=given["rollout_mask"],
            baseline=others["baseline"],
            scale=others["scale"],
            eps=others["eps"],
        )
    return Tokens(**{name: given[name] for name in _TOKENS}), groups, form


def token_arguments(tokens: Tokens) -> dict[str, Tensor | None]:
    """Return the tensors that the op takes, by name."""
    arguments = tokens._asdict()
    weights = arguments.pop("weights")
    assert weights is None, "the op works out the shares from the offsets"
    return arguments


def check_token_tensors(given: Mapping[str, Any], number: int, device: torch.device) -> None:
    """Check the tensors of `number` tokens that an op was given by name, against each other."""
    offsets, advantages = given["offsets"], given["advantages"]
    sequences.check_offset_tensor("offsets", offsets, number, device)
    batch = offsets.shape[0] - 1
    per_sequence = advantages is not None and advantages.shape[:1] == (batch,)
    checks.check_inside(
        device,
        *[(name, given[name], (number,), checks.FLOATS) for name in ("old", "ref", "behaviour")],
        ("entropy", given.get("entropy"), (number,), checks.FLOATS),
        ("advantages", advantages, (batch if per_sequence else number,), checks.FLOATS),
        ("mask", given["mask"], (number,), checks.BOOL),
        ("normalizer", given["normalizer"], (), checks.WIDE_FLOATS),
        ("entropy_normalizer", given["entropy_normalizer"], (), checks.WIDE_FLOATS),
    )


def check_group_tensors(rewards: Tensor, offsets: Tensor, mask: Tensor | None) -> None:
    """Check the tensors of groups against each other."""
    checks.check_tensor("rewards", rewards, dtypes=checks.WIDE_FLOATS, dim=1)
    sequences.check_offset_tensor("groups", offsets, rewards.shape[0], rewards.device)
    checks.check_inside(rewards.device, ("rollout_mask", mask, rewards.shape, checks.BOOL))


@torch.library.custom_op("mgrpo_kernels::group_advantages", mutates_args=())
def group_advantages_op(
    rewards: Tensor,  # (B,) float32 or float64
    offsets: Tensor,  # (P+1,) int64
    mask: Tensor | None,  # (B,)
    baseline: str,
    scale: str,
    eps: float,
    backend: str,
) -> Tensor:
    """Return the advantages ``(B,)``."""
    checks.check_choice("baseline", baseline, BASELINES)
    checks.check_choice("scale", scale, SCALES)
    check_group_tensors(rewards, offsets, mask)
    sequences.check_offset_values("groups", offsets, rewards.shape[0])
    groups = Groups(rewards, offsets, mask, baseline, scale, eps)
    advantages: Tensor = backends.implementation(OP, backend).group_advantages(groups)
    return advantages


@group_advantages_op.register_fake
def _(rewards: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(rewards)


@torch.library.custom_op("mgrpo_kernels::policy_loss", mutates_args=(), schema=CALL.text)
def policy_loss_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, metrics ``(9,)``, d loss / d logprob before the normalizer ``(T,)``, and the two factors to apply ``(2,)``."""
    given = CALL.unpack(arguments)
    tokens, groups, form = unpack(given)
    _autograd.refuse_tangents("policy_loss", tokens.logprob, tokens.entropy)
    checks.check_tensor("logprob", tokens.logprob, dim=1)
    check_token_tensors(given, tokens.logprob.shape[0], tokens.logprob.device)
    reads_offsets = given["backend"] != "native"  # whose kernels check their values themselves
    if reads_offsets:
        sequences.check_offset_values("cu_seqlens", tokens.offsets, tokens.logprob.shape[0])
    if groups is not None:
        number = tokens.offsets.shape[0] - 1
        checks.check_inside(tokens.logprob.device, ("rewards", groups.rewards, (number,), checks.FLOATS))
        check_group_tensors(groups.rewards, groups.offsets, groups.mask)
        if reads_offsets:
            sequences.check_offset_values("groups", groups.offsets, number)
    elif tokens.advantages is None:
        raise ValueError("advantages: expected a tensor where there are no rewards, got None")
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = backends.implementation(OP, given["backend"]).forward(
        tokens, groups, form
    )
    return outputs


@policy_loss_op.register_fake
def _(logprob: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(logprob)
    return (
        logprob.new_empty((), dtype=dtype),
        logprob.new_empty(len(METRICS), dtype=torch.float32),
        torch.empty_like(logprob, dtype=dtype),
        logprob.new_empty(2, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = CALL.unpack(inputs)
    _, metrics, gradient, scales = output
    ctx.mark_non_differentiable(metrics, gradient, scales)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        gradient, scales, *(given[name] for name in ("logprob", "entropy", "mask", "offsets", "rollout_mask"))
    )


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needed = dict(zip(CALL.names, ctx.needs_input_grad, strict=False))
    found = gradients(grad_loss, ctx.saved_tensors, needed["logprob"], needed["entropy"])
    results = dict(zip(("logprob", "entropy"), found, strict=True))
    return tuple([results.get(name) for name in CALL.names])


_autograd.register(policy_loss_op, policy_loss_backward_op, _backward, _setup_context)
