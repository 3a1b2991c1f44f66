"""The losses dppo and gmpo: a plain float64 formula and TRL's code as oracles."""

import collections
from types import SimpleNamespace

import pytest
import torch
from contract import each_backend
from off_policy import B, L, assert_means, batch, mean_over_tokens, ours, sequence_mean

from mgrpo_kernels import grpo_loss, policy_loss
from mgrpo_kernels.ops.policy_loss import OP
from mgrpo_kernels.ops.policy_loss.specs import METRICS


def plain_dppo(logprobs, old, advantages, kind, rise, fall, cap):
    """Return the loss of each token: the mask and the truncated weight are constants."""
    with torch.no_grad():
        p, q = logprobs.exp(), old.exp()
        kl = q * (old - logprobs) + (1 - q) * ((1 - q).log() - (1 - p).log())
        far = (p - q).abs() if kind == "tv" else kl
        gains = (advantages > 0).unsqueeze(1)
        masked = torch.where(gains, (p > q) & (far > rise), (p < q) & (far > fall))
        weight = (logprobs - old).exp().clamp(max=cap)
    return torch.where(masked, 0.0, -weight * advantages.unsqueeze(1) * logprobs), masked


@each_backend(OP)
@pytest.mark.parametrize("kind", ["tv", "kl"])
@pytest.mark.parametrize("cap", [1.2, 20.0])
def test_dppo_masks_tokens_that_have_moved_too_far(backend, kind, cap):
    logprobs, old, _, mask, advantages = batch(6)
    bounds = (0.05, 0.09) if kind == "tv" else (0.01, 0.03)
    leaf = logprobs.clone().requires_grad_()
    values, masked = plain_dppo(leaf, old, advantages, kind, *bounds, cap)
    got = ours(
        backend,
        logprobs,
        old,
        None,
        mask,
        advantages,
        loss_type=f"dppo_{kind}",
        dppo_cap=cap,
        **{f"dppo_{kind}_bounds": bounds},
    )
    assert_means(got, mean_over_tokens(values, mask), leaf)
    for name, sign in (("clip_high_count", 1), ("clip_low_count", -1)):
        assert got[2][name] == (mask & masked & (advantages * sign > 0).unsqueeze(1)).sum() > 0


@each_backend(OP)
@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_dppo_of_probabilities_0_and_1(backend, kind):
    """A token that had or has probability 0 or 1, or a log-prob that rounding has lifted above 0, makes no NaN of the mask."""
    old = torch.tensor([[0.0, -1.0, 1e-7, -torch.inf, -1e-9, -5.0]])
    new = torch.tensor([[-1.0, 0.0, -0.5, -1.0, 1e-7, 2e-7]])
    for advantage in (1.0, -1.0):
        found = []
        for name in ("reference", backend):
            leaf = new.clone().requires_grad_()
            options = {"loss_type": f"dppo_{kind}", "backend": name}
            loss, metrics = policy_loss(leaf, old, torch.tensor([advantage]), **options)
            found.append([loss.detach(), torch.autograd.grad(loss, leaf)[0], *metrics.values()])
        assert found[0][0].isfinite()
        for want, got in zip(*found, strict=True):
            torch.testing.assert_close(got, want)
        assert found[0][1][0].ne(0).tolist() == (
            [True, False, True, False, True, False] if advantage > 0 else [False, True, False, True, True, True]
        )


def trl_gmpo(logprobs, old, mask, advantages, ref, beta):
    """GMPOTrainer._compute_loss itself, on a stand-in for the trainer."""
    from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer

    metrics = collections.defaultdict(lambda: collections.defaultdict(list))
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs, torch.zeros_like(logprobs), None),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
        args=SimpleNamespace(),
        top_entropy_quantile=1.0,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=0.3,
        _metrics=metrics,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
    )
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(B, 1, dtype=torch.int64),
        "completion_ids": torch.zeros(B, L, dtype=torch.int64),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
    }
    return GMPOTrainer._compute_loss(trainer, None, inputs), metrics["train"]


@each_backend(OP)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_gmpo_is_trls(backend, beta):
    logprobs, old, ref, mask, advantages = batch(6)
    advantages[2] = 0.0  # TRL's loss of an empty sequence is a constant, -advantage; ours is 0
    leaf = logprobs.clone().requires_grad_()
    want, seen = trl_gmpo(leaf, old, mask, advantages, ref, beta)
    got = ours(
        backend,
        logprobs,
        old,
        None,
        mask,
        advantages,
        loss_type="gmpo",
        clip_low=0.2,
        clip_high=0.3,
        kl_coef=beta,
        ref_logprobs=ref.float(),
    )
    assert_means(got, want, leaf)
    for name, theirs in (("clip_low_count", "clip_ratio/low_mean"), ("clip_high_count", "clip_ratio/high_mean")):
        assert got[2][name] / mask.sum() == pytest.approx(seen[theirs][0]) != 0


@each_backend(OP)
def test_gmpo_clips_by_the_sign_of_each_tokens_advantage(backend):
    logprobs, old, _, mask, _ = batch(7)
    advantages = torch.randn(B, L, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaf = logprobs.clone().requires_grad_()
    log_ratio = leaf - old
    clipped = torch.where(advantages > 0, log_ratio.clamp(max=0.3), log_ratio.clamp(min=-0.2))
    want = -(sequence_mean(clipped, mask).exp() * sequence_mean(advantages, mask)).mean()
    got = ours(backend, logprobs, old, None, mask, advantages, loss_type="gmpo", clip_low=0.2, clip_high=0.3)
    assert_means(got, want, leaf)


@each_backend(OP)
@pytest.mark.parametrize("loss_type", ["grpo", "gmpo"])
def test_grpo_loss_takes_masks_and_the_mean_as_its_scale(backend, loss_type):
    """With groups an advantage is known only inside the kernel; MaxRL's is (reward - mean) / mean."""
    logprobs, old, behaviour, mask, _ = batch(8)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    mean = rewards.view(2, 4).mean(1).repeat_interleave(4)
    options = {"loss_type": loss_type, "off_policy_delta": 0.02, "geometric_cap": 1.1, "backend": backend}
    tensors = {"mask": mask, "behaviour_logprobs": behaviour.float()}
    leaves = [logprobs.float().requires_grad_() for _ in range(2)]
    got = grpo_loss(leaves[0], old.float(), rewards, 4, scale="mean", eps=0.0, **tensors, **options)
    want = policy_loss(leaves[1], old.float(), (rewards - mean) / mean, **tensors, **options)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(
        *(torch.autograd.grad(each.loss, leaf)[0] for each, leaf in zip((got, want), leaves, strict=True))
    )
    for name in METRICS:
        torch.testing.assert_close(got.metrics[name], want.metrics[name])
    assert want.metrics["masked_count"] > 0
