"""Policy losses and group advantages on the device: every loss type, level and behaviour mode, against the reference."""

import itertools

import pytest
import torch
from on_device import NAN, hold, pick

from mgrpo_kernels import group_advantages, grpo_loss, policy_loss
from mgrpo_kernels.ops.policy_loss.specs import BASELINES, BEHAVIOUR_MODES, IMPORTANCE_LEVELS, LOSS_TYPES, SCALES

SEQUENCES, LONG, SHORT = 6, pick(1000, 140), pick(60, 20)  # long ones take another launch shape
CASES = [
    case
    for case in itertools.product(LOSS_TYPES, IMPORTANCE_LEVELS, (None, *BEHAVIOUR_MODES))
    if not (case[0] == "vespo" and case[2] is not None and case[2].startswith(("sequence", "geometric")))
]


def batch(length, *, whole_sequences=False, shifted=False):
    """Log-probs with NaN where masked, one sequence all masked. Weights of whole sequences must not overflow: smaller steps.

    `shifted`: the old log-probs of a sequence lie off together, so that its mean ratio is clipped.
    """
    torch.manual_seed(0)
    shape, step = (SEQUENCES, length), 0.002 if whole_sequences else 0.3
    logprobs, mask = torch.randn(shape) * 0.5 - 2, torch.rand(shape) > 0.2
    mask[3] = False
    old, ref, behaviour = (logprobs + step * torch.randn(shape) for _ in range(3))
    if shifted:
        shift = torch.tensor([-0.4, 0.0, 0.4]).repeat(2).unsqueeze(1)
        old, behaviour = old + shift, behaviour + shift
    inputs = {"logprobs": logprobs, "old": old, "ref": ref, "behaviour": behaviour, "entropy": torch.rand(shape)}
    inputs = {name: torch.where(mask, values, NAN) for name, values in inputs.items()}
    inputs["logprobs"].requires_grad_(), inputs["entropy"].requires_grad_()
    return inputs | {"mask": mask, "advantages": torch.randn(SEQUENCES)}


@pytest.mark.parametrize(("loss_type", "level", "mode"), CASES)
def test_losses(loss_type, level, mode):
    i = CASES.index((loss_type, level, mode))
    options = {
        "loss_type": loss_type,
        "importance_level": level,
        "behaviour_mode": mode or "token_mask",
        "kl_coef": 0.1,
        "entropy_coef": 0.02,
        "kl_estimator": ("k3", "k2", "k1")[i % 3],
        "kl_bias_correction": i % 2 == 1,
        "max_response_tokens": 64,
        "clip_delta": 1.15 if i % 4 == 1 else None,
        "off_policy_delta": 0.0 if i % 3 == 2 else None,
    }
    inputs = batch(
        SHORT if i % 4 == 3 else LONG,
        whole_sequences="sequence" in f"{level} {mode}" or loss_type == "vespo",
        shifted=level == "sequence" and loss_type != "vespo",
    )
    if i % 5 == 4:
        inputs["advantages"] = torch.randn(inputs["mask"].shape)

    def function(inputs, backend):
        result = policy_loss(
            inputs["logprobs"],
            inputs["old"],
            inputs["advantages"],
            mask=inputs["mask"],
            ref_logprobs=inputs["ref"],
            entropy=inputs["entropy"],
            behaviour_logprobs=None if mode is None else inputs["behaviour"],
            backend=backend,
            **options,
        )
        return result.loss, *result.metrics.values()

    hold(function, inputs, floor=1e-5)  # scalars: one draw each


def test_packed_on_policy():
    inputs, lengths = batch(LONG), torch.tensor([LONG - 3, 0, 1, 70])
    total = int(lengths.sum())
    packed = {"logprobs": inputs["logprobs"].detach().reshape(-1)[:total].nan_to_num(-2.0).requires_grad_()}
    packed["offsets"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    packed["advantages"] = torch.randn(4)

    def function(inputs, backend):
        result = policy_loss(
            inputs["logprobs"],
            None,
            inputs["advantages"],
            cu_seqlens=inputs["offsets"],
            loss_type="dapo",
            backend=backend,
        )
        return result.loss, *result.metrics.values()

    hold(function, packed, floor=1e-5)


SIZES = [0, 5, 1, 32, 2, pick(300, 40)]  # of groups


def rewards_of(sizes):
    torch.manual_seed(0)
    rewards = torch.rand(sum(sizes)).round(decimals=1)
    rewards[:5] = 0.3  # a group that agrees
    mask = torch.rand(sum(sizes)) > 0.2
    return {"rewards": torch.where(mask, rewards, NAN), "mask": mask, "offsets": torch.tensor([0, *sizes]).cumsum(0)}


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_group_advantages(baseline, scale):
    def function(inputs, backend):
        return [
            group_advantages(
                inputs["rewards"],
                inputs["offsets"],
                mask=inputs["mask"],
                baseline=baseline,
                scale=scale,
                backend=backend,
            )
        ]

    got = hold(function, rewards_of(SIZES), floor=1e-5)["output 0"]
    assert (got[:6] == 0).all()  # they agree; one alone


@pytest.mark.parametrize("scale", SCALES)
def test_grpo_loss(scale):
    inputs = batch(SHORT) | {"rewards": torch.rand(SEQUENCES), "kept": torch.tensor([1, 1, 0, 1, 1, 1]).bool()}

    def function(inputs, backend):
        result = grpo_loss(
            inputs["logprobs"],
            inputs["old"],
            inputs["rewards"],
            3,
            rollout_mask=inputs["kept"],
            scale=scale,
            mask=inputs["mask"],
            ref_logprobs=inputs["ref"],
            kl_coef=0.01,
            backend=backend,
        )
        return result.loss, *result.metrics.values()

    del inputs["entropy"]
    got = hold(function, inputs, floor=1e-5)
    assert (got["gradient of logprobs"][2] == 0).all()
