"""verl's own corrections and losses as oracles of ours: rollout correction, dppo, geo_mean, Clip-Cov and KL-Cov."""

# ruff: noqa: E402 - what need() makes importable is imported after it
import itertools

import pytest
import torch
from installed_peers import need

need("verl")

from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.workers.config import ActorConfig

from mgrpo_kernels import clip_cov_mask, kl_cov_penalty, policy_loss
from mgrpo_kernels.ops.policy_loss import OP

B, L = 6, 11


def each_backend(function):
    from mgrpo_kernels import backend as backends

    return pytest.mark.parametrize("backend", list(backends._registry[OP]))(function)


def batch(seed=0, spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, L, generator=generator) * 3 - 0.05
    new = (old + spread * torch.randn(B, L, generator=generator)).clamp(max=-0.01)
    behaviour = old + spread * torch.randn(B, L, generator=generator)
    advantages = torch.randn(B, 1, generator=generator).expand(B, L).clone()
    mask = torch.arange(L) < torch.tensor([L, 4, 1, 7, 9, L - 1]).unsqueeze(-1)
    return new, old, behaviour, advantages, mask


def actor(mode="token-mean", low=0.2, high=0.28, most=20.0, **policy_loss_options):
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        loss_agg_mode=mode,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=most,
    )
    config.policy_loss.__dict__.update(policy_loss_options)
    return config


def verls(name, config, new, old, advantages, mask, weights=None, mode="token-mean"):
    """Return loss and gradient of verl's policy loss of this name, and what it logs."""
    leaf = new.clone().requires_grad_()
    loss, metrics = core_algos.get_policy_loss_fn(name)(
        old_log_prob=old,
        log_prob=leaf,
        advantages=advantages,
        response_mask=mask.float(),
        loss_agg_mode=mode,
        config=config,
        rollout_is_weights=weights,
    )
    return loss.detach(), torch.autograd.grad(loss, leaf)[0], metrics


def ours(new, old, advantages, mask, extra=None, **options):
    leaf = new.clone().requires_grad_()
    found = policy_loss(leaf, old, advantages, mask=mask, **options)
    loss = found.loss if extra is None else found.loss + extra(leaf)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0], found.metrics


def assert_same(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(got[1], want[1], rtol=2e-5, atol=1e-6)


CORRECTIONS = [
    ("token", "2.0", None, None, {"behaviour_mode": "token_truncate", "behaviour_cap": 2.0}),
    ("token", "0.8_1.3", None, None, {"behaviour_mode": "token_mask", "behaviour_floor": 0.8, "behaviour_cap": 1.3}),
    ("sequence", "0.5_2.0", None, None, {"behaviour_mode": "sequence_mask", "behaviour_floor": 0.5}),
    (None, None, "seq_mean_k1", "0.93_1.1", {"behaviour_mode": "none", "geometric_floor": 1 / 1.1, "geometric_cap": 1 / 0.93}),
    ("token", "1.2", "seq_mean_k1", "0.93_1.1", {"behaviour_cap": 1.2, "geometric_floor": 1 / 1.1, "geometric_cap": 1 / 0.93}),
]  # fmt: skip


@each_backend
@pytest.mark.parametrize(("level", "bounds", "rejection", "thresholds", "options"), CORRECTIONS)
def test_rollout_corrections_are_verls(backend, level, bounds, rejection, thresholds, options):
    """TIS, IcePop, sequence masks, Geo-RS, and Geo-RS with TIS. verl's rejected tokens leave the normalizer: here it is given."""
    new, old, behaviour, advantages, mask = batch()
    weights, keep = None, mask.float()
    if level is not None:
        weights, _ = rollout_corr_helper.compute_rollout_correction_weights(
            old - behaviour, mask.float(), rollout_is=level, rollout_is_threshold=bounds
        )
    if rejection is not None:
        keep, _ = rollout_corr_helper.compute_rollout_rejection_mask(
            old - behaviour, mask.float(), rollout_rs=rejection, rollout_rs_threshold=thresholds
        )
        assert 0 < keep.sum() < mask.sum()
    want = verls("vanilla", actor(), new, old, advantages, keep.bool(), weights)
    got = ours(
        new,
        old,
        advantages,
        mask,
        behaviour_logprobs=behaviour,
        normalizer=keep.sum(),
        loss_type="dapo",
        clip_low=0.2,
        clip_high=0.28,
        backend=backend,
        **options,
    )
    assert_same(got, want)
    removed = mask & ((keep == 0) | (False if weights is None else weights == 0))
    assert got[2]["masked_count"] == removed.sum()


@each_backend
@pytest.mark.parametrize("kind", ["tv", "kl"])
@pytest.mark.parametrize("most", [1.2, 20.0])
def test_dppo_is_verls(backend, kind, most):
    new, old, _, advantages, mask = batch(1)
    low, high = (0.04, 0.06) if kind == "tv" else (0.01, 0.02)
    want = verls(f"dppo_{kind}", actor(low=low, high=high, most=most), new, old, advantages, mask)
    got = ours(
        new,
        old,
        advantages,
        mask,
        loss_type=f"dppo_{kind}",
        dppo_cap=most,
        backend=backend,
        **{f"dppo_{kind}_bounds": (high, low)},
    )
    assert_same(got, want)
    masked = (got[2]["clip_low_count"] + got[2]["clip_high_count"]) / mask.sum()
    assert masked.item() == pytest.approx(want[2]["actor/pg_clipfrac"]) != 0


@each_backend
def test_gmpo_is_verls_geo_mean(backend):
    new, old, _, advantages, mask = batch(2)
    want = verls("geo_mean", actor(low=0.15, high=0.2), new, old, advantages, mask)
    assert_same(ours(new, old, advantages, mask, loss_type="gmpo", clip_low=0.15, clip_high=0.2, backend=backend), want)


@pytest.mark.parametrize(("share", "seed"), itertools.product([0.02, 0.3], range(3)))
def test_clip_cov_is_verls(share, seed):
    """With the same random choice: verl draws it from torch's own generator."""
    new, old, _, _, mask = batch(seed)
    advantages = 3 * torch.randn(B, L, generator=torch.Generator().manual_seed(seed))
    options = {"clip_cov_ratio": share, "clip_cov_lb": 0.5, "clip_cov_ub": 4.0}
    torch.manual_seed(seed)
    want = verls("clip_cov", actor(**options), new, old, advantages, mask)
    torch.manual_seed(seed)
    keep = clip_cov_mask(
        new, old, advantages, mask=mask, share=share, cov_low=0.5, cov_high=4.0, clip_low=0.2, clip_high=0.28
    )
    got = ours(new, old, advantages * keep, mask, loss_type="dapo", clip_low=0.2, clip_high=0.28)
    assert_same(got, want)
    assert (mask & ~keep).sum() / mask.sum() == pytest.approx(want[2]["actor/pg_clipfrac"]) != 0


@pytest.mark.parametrize(("share", "coef"), itertools.product([0.0002, 0.2], [0.5, 1.0]))
def test_kl_cov_is_verls(share, coef):
    new, old, _, _, mask = batch(3)
    advantages = 3 * torch.randn(B, L, generator=torch.Generator().manual_seed(3))
    want = verls("kl_cov", actor(kl_cov_ratio=share, ppo_kl_coef=coef), new, old, advantages, mask)
    got = ours(
        new,
        old,
        advantages,
        mask,
        lambda leaf: kl_cov_penalty(leaf, old, advantages, mask=mask, share=share, coef=coef),
        loss_type="dapo",
        clip_low=1.0,
        clip_high=1e30,
    )
    assert_same(got, want)
