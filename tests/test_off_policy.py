"""Bounds and masks of off-policy tokens and sequences: plain float64 formulas and TRL's code as oracles."""

import itertools
import math

import pytest
import torch
from contract import each_backend
from off_policy import L, assert_means, batch, mean_over_tokens, ours, plain_clip, plain_weight, sequence_mean

from mgrpo_kernels import policy_loss
from mgrpo_kernels.ops.policy_loss import OP

LEVELS = ("token", "sequence", "geometric")


@each_backend(OP)
@pytest.mark.parametrize(("level", "bound"), itertools.product(LEVELS, ("truncate", "mask")))
@pytest.mark.parametrize(("floor", "cap"), [(0.0, 1.1), (0.85, 1.2), (0.95, 50.0)])
def test_behaviour_weights_are_bounded_on_both_sides(backend, level, bound, floor, cap):
    logprobs, old, behaviour, mask, advantages = batch()
    weight = plain_weight(old, behaviour, mask, level, bound, floor, cap)
    leaf = logprobs.clone().requires_grad_()
    want = mean_over_tokens(plain_clip(leaf, old, advantages) * weight, mask)
    got = ours(
        backend,
        logprobs,
        old,
        behaviour,
        mask,
        advantages,
        loss_type="dapo",
        behaviour_mode=f"{level}_{bound}",
        behaviour_floor=floor,
        behaviour_cap=cap,
    )
    assert_means(got, want, leaf)
    assert got[2]["masked_count"] == (mask & (weight == 0)).sum()
    assert (got[2]["masked_count"] > 0) == (bound == "mask")


@each_backend(OP)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("bound", "delta"), [("truncate", None), ("mask", None), ("truncate", 1e9)])
def test_only_a_mask_counts_masked_tokens(backend, level, bound, delta):
    """A truncated weight that underflows to 0 is no mask; next to a mask of sequences it counts."""
    logprobs, old, _, mask, advantages = batch()
    got = ours(
        backend,
        logprobs,
        old,
        old + 300.0,
        mask,
        advantages,
        loss_type="dapo",
        behaviour_mode=f"{level}_{bound}",
        off_policy_delta=delta,
    )
    assert (got[1] == 0).all()
    assert got[2]["masked_count"] == (0 if bound == "truncate" and delta is None else mask.sum())


@each_backend(OP)
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_mask", "geometric_truncate", "none"])
@pytest.mark.parametrize(("floor", "cap"), [(0.0, 1.05), (0.95, None), (0.93, 1.07)])
def test_sequences_are_masked_by_their_geometric_mean(backend, mode, floor, cap):
    logprobs, old, behaviour, mask, advantages = batch(1)
    level, _, bound = mode.partition("_")
    weight = 1.0 if mode == "none" else plain_weight(old, behaviour, mask, level, bound, 0.5, 2.0)
    mean = sequence_mean(old - behaviour, mask).exp()
    keep = (mean >= floor) & (mean <= (math.inf if cap is None else cap))
    leaf = logprobs.clone().requires_grad_()
    want = mean_over_tokens(plain_clip(leaf, old, advantages) * weight * keep, mask)
    got = ours(
        backend,
        logprobs,
        old,
        behaviour,
        mask,
        advantages,
        loss_type="dapo",
        behaviour_mode=mode,
        behaviour_floor=0.5,
        behaviour_cap=2.0,
        geometric_floor=floor,
        geometric_cap=cap,
    )
    assert_means(got, want, leaf)
    assert got[2]["masked_count"] == (mask & (weight * keep == 0)).sum()
    assert 0 < (mask & ~keep).sum() < mask.sum()


@each_backend(OP)
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("delta", [0.0, 0.05, 0.3])
def test_the_off_policy_mask_is_trls(backend, sampled, per_token, delta):
    from trl.trainer.grpo_trainer import GRPOTrainer

    logprobs, old, behaviour, mask, advantages = batch(2)
    if per_token:
        advantages = advantages.unsqueeze(1) * torch.linspace(-1, 1, L)
    theirs = advantages if per_token else advantages.unsqueeze(1)
    keep = GRPOTrainer.get_off_policy_mask(theirs, logprobs, behaviour if sampled else old, mask.long(), delta)
    leaf = logprobs.clone().requires_grad_()
    weight = plain_weight(old, behaviour, mask, "token", "truncate", 0.0, 2.0) if sampled else 1.0
    ratio = (leaf - old).exp()
    surrogate = -torch.minimum(ratio * theirs, ratio.clamp(0.8, 1.2) * theirs)
    got = ours(
        backend,
        logprobs,
        old,
        behaviour if sampled else None,
        mask,
        advantages,
        loss_type="dapo",
        off_policy_delta=delta,
    )
    assert_means(got, mean_over_tokens(surrogate * keep * weight, mask), leaf)
    assert got[2]["masked_count"] == (mask & (keep == 0)).sum()
    assert got[2]["masked_count"] > 0 or delta == 0.3


@each_backend(OP)
@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "vespo", "dppo_tv", "gmpo"])
def test_masked_sequences_have_no_surrogate_in_any_loss(backend, loss_type):
    """Their KL penalty stays, and the normalizer counts them."""
    logprobs, old, behaviour, mask, advantages = batch(3)
    keep = sequence_mean(behaviour - logprobs, mask) <= 0.0
    options = {"loss_type": loss_type, "kl_coef": 0.1, "ref_logprobs": old.float(), "behaviour_mode": "none"}
    got = ours(backend, logprobs, old, behaviour, mask, -advantages.abs(), **options, off_policy_delta=0.0)
    want = ours(backend, logprobs, old, behaviour, mask, -advantages.abs() * keep.squeeze(1), **options)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])
    assert got[2]["masked_count"] == (mask & ~keep & (advantages != 0).unsqueeze(1)).sum()


@each_backend(OP)
@pytest.mark.parametrize("loss_type", ["grpo", "vespo", "gmpo"])
def test_without_a_mode_behaviour_logprobs_weigh_nothing(backend, loss_type):
    inputs = batch(4)
    with_none = ours(backend, *inputs, loss_type=loss_type, behaviour_mode="none")
    without = ours(backend, *inputs[:2], None, *inputs[3:], loss_type=loss_type)
    assert torch.equal(with_none[0], without[0])
    assert torch.equal(with_none[1], without[1])


@each_backend(OP)
@pytest.mark.parametrize(
    ("mode", "loss_type"),
    [
        *itertools.product(
            ["token_truncate", "token_mask", "sequence_mask", "geometric_truncate", "none"], ["dapo", "gmpo", "dppo_kl"]
        ),
        *itertools.product(["token_truncate", "token_mask", "none"], ["vespo"]),
    ],
)
def test_numbers_that_are_none_in_the_masks(backend, mode, loss_type):
    """NaN, infinities and overflow, each on its own, as the sampler's or the old log-prob: all is as in the reference."""
    hostile = [torch.nan, torch.inf, -torch.inf, 200.0, -200.0]
    bounds = [{}, {"geometric_cap": 1.5, "geometric_floor": 0.5, "off_policy_delta": 0.1}]
    advantages = torch.tensor([1.0, -1.0, 0.0])
    for odd, of_old, more in itertools.product(hostile, (False, True), bounds):
        found = []
        for name in ("reference", backend):
            behaviour, old = torch.full((3, 3), -1.0), torch.full((3, 3), -1.1)
            (old if of_old else behaviour)[:, 1] = odd
            leaf = torch.full((3, 3), -0.9, requires_grad=True)
            loss, metrics = policy_loss(
                leaf,
                old,
                advantages,
                behaviour_logprobs=behaviour,
                loss_type=loss_type,
                behaviour_mode=mode,
                behaviour_floor=0.5,
                backend=name,
                **more,
            )
            found.append([loss.detach(), torch.autograd.grad(loss, leaf)[0], *metrics.values()])
        for want, got in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7, equal_nan=True, msg=f"{odd} {of_old} {more}")


@each_backend(OP)
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize(
    "options",
    [
        *({"behaviour_mode": f"{level}_{bound}"} for level in LEVELS for bound in ("truncate", "mask")),
        {"behaviour_mode": "none", "geometric_floor": 0.9},
        {"behaviour_mode": "none", "off_policy_delta": 0.1},
    ],
)
def test_a_nan_of_the_sampler_is_not_swallowed(backend, advantage, options):
    behaviour = torch.zeros(2, 3)
    behaviour[0, 1] = torch.nan
    found = policy_loss(
        torch.zeros(2, 3),
        None,
        torch.tensor([advantage, 1.0]),
        behaviour_logprobs=behaviour,
        backend=backend,
        **options,
    )
    assert found.loss.isnan()


@each_backend(OP)
def test_a_masked_token_with_an_infinite_ratio_has_no_loss(backend):
    """But NaN stays."""
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    old, behaviour = torch.tensor([[-200.0, -1.0]]), torch.tensor([[0.0, -1.0]])
    options = {"behaviour_mode": "token_mask", "behaviour_floor": 0.5, "loss_type": "dapo", "backend": backend}
    loss = policy_loss(logprobs, old, torch.tensor([-1.0]), behaviour_logprobs=behaviour, **options).loss
    assert loss == 0.5
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [[0.0, 0.5]]
    nan = torch.tensor([[torch.nan, -1.0]])
    assert policy_loss(nan, old, torch.tensor([-1.0]), behaviour_logprobs=behaviour, **options).loss.isnan()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"behaviour_floor": 2.5}, "behaviour_floor: expected at most behaviour_cap 2.0, got 2.5"),
        ({"behaviour_floor": -0.1}, "behaviour_floor: expected at least 0.0, got -0.1"),
        (
            {"geometric_floor": 1.1, "geometric_cap": 1.0},
            "geometric_floor: expected at most geometric_cap 1.0, got 1.1",
        ),
        ({"geometric_cap": 0.0}, "geometric_cap: expected more than 0.0"),
        (
            {"geometric_cap": 1.1, "behaviour_logprobs": None},
            "behaviour_logprobs: expected a tensor with geometric_cap",
        ),
        ({"off_policy_delta": -1.0}, "off_policy_delta: expected at least 0.0, got -1.0"),
        ({"off_policy_delta": float("nan")}, "off_policy_delta: expected a finite number"),
        ({"dppo_tv_bounds": (0.1, -0.1)}, "dppo_tv_bounds: expected at least 0.0, got -0.1"),
        ({"dppo_cap": 0.0}, "dppo_cap: expected more than 0.0"),
        (
            {"loss_type": "vespo", "behaviour_mode": "geometric_mask"},
            "behaviour_mode: expected token_truncate, token_mask or none",
        ),
    ],
)
def test_bounds_that_cross_and_masks_that_lack_an_input_are_refused(options, message):
    given = {"behaviour_logprobs": torch.zeros(2, 3)} | options
    with pytest.raises(ValueError, match=message):
        policy_loss(torch.zeros(2, 3), None, torch.zeros(2), **given)
