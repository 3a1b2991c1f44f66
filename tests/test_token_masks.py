"""Choices of tokens over a batch: TRL's mask of the highest entropies; the tests of verl's integration have Clip-Cov and KL-Cov."""

from types import SimpleNamespace

import pytest
import torch

from mgrpo_kernels import clip_cov_mask, kl_cov_penalty, policy_loss, top_entropy_mask


def batch(seed=0, rows=5, length=12):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=generator) > 0.3
    mask[2] = False
    return torch.rand(rows, length, generator=generator) * 3, mask, generator


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_highest_entropies_are_those_of_trl(share, seed):
    from trl.trainer.grpo_trainer import GRPOTrainer

    entropy, mask, _ = batch(seed)
    accelerator = SimpleNamespace(pad_across_processes=lambda x, dim, pad_index: x, gather=lambda x: x)
    want = GRPOTrainer.get_high_entropy_mask(SimpleNamespace(accelerator=accelerator), entropy, mask, 1 - share)
    got = top_entropy_mask(torch.where(mask, entropy, torch.nan), share, mask=mask)
    assert torch.equal(got, want.bool() & mask)
    assert 1 <= got.sum() <= share * mask.sum() + 1


def test_tokens_left_out_have_no_surrogate_but_a_place_in_the_normalizer():
    entropy, mask, generator = batch()
    logprobs = -torch.rand(mask.shape, generator=generator).requires_grad_()
    advantages = torch.randn(mask.shape[0], generator=generator)
    keep = top_entropy_mask(entropy, 0.2, mask=mask)
    loss = policy_loss(logprobs, None, advantages.unsqueeze(1) * keep, mask=mask, loss_type="dapo").loss
    want = -(advantages.unsqueeze(1) * keep).sum() / mask.sum()
    torch.testing.assert_close(loss, want)
    assert torch.equal(torch.autograd.grad(loss, logprobs)[0] != 0, keep)


def test_an_entropy_that_is_nan_is_the_highest():
    entropy = torch.tensor([0.1, torch.nan, 0.3, 0.2])
    assert top_entropy_mask(entropy, 0.25).tolist() == [False, True, False, False]
    assert top_entropy_mask(entropy, 0.3).tolist() == [False, True, False, False]
    assert top_entropy_mask(entropy, 0.5, mask=~entropy.isnan()).tolist() == [False, False, True, True]


def test_a_batch_without_tokens_has_no_choice():
    none = torch.zeros(2, 3, dtype=torch.bool)
    values = torch.full((2, 3), torch.nan, requires_grad=True)
    assert not top_entropy_mask(values, 0.5, mask=none).any()
    assert not clip_cov_mask(values, values, values, mask=none).any()
    penalty = kl_cov_penalty(values, values.detach(), values.detach(), mask=none)
    assert penalty == 0
    assert (torch.autograd.grad(penalty, values)[0] == 0).all()


def covariances(logprobs, advantages, mask):
    """Return the definition, in float64 and by hand."""
    values, gains = logprobs[mask].double(), advantages[mask].double()
    return (values - values.mean()) * (gains - gains.mean())


def clip_cov_batch():
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(6, 40, generator=generator) > 0.2
    logprobs, advantages = (2 * torch.randn(6, 40, generator=generator) for _ in range(2))
    return logprobs, logprobs + 0.3 * torch.randn(6, 40, generator=generator), advantages, mask


@pytest.mark.parametrize("share", [0.001, 0.05, 1.0])
def test_clip_cov_leaves_out_tokens_with_a_covariance_between_the_bounds(share):
    logprobs, old, advantages, mask = clip_cov_batch()
    keep = clip_cov_mask(
        logprobs, old, advantages, mask=mask, share=share, cov_low=1.0, cov_high=5.0, generator=torch.Generator()
    )
    covariance = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(
        mask, covariances(logprobs, advantages, mask)
    )
    ratio = (logprobs - old).exp()
    clipped = torch.where(advantages > 0, ratio > 1.2, (ratio < 0.8) & (advantages < 0))
    between = mask & (covariance > 1.0) & (covariance < 5.0) & ~clipped
    left_out = mask & ~keep
    assert not keep[~mask].any()
    assert not (left_out & ~between).any()
    assert left_out.sum() == min(max(1, int(share * mask.sum())), between.sum())


def test_kl_cov_penalises_the_tokens_with_the_largest_covariance():
    logprobs, old, advantages, mask = clip_cov_batch()
    leaf = logprobs.clone().requires_grad_()
    penalty = kl_cov_penalty(leaf, old, advantages, mask=mask, share=0.05, coef=0.5)
    number = int(0.05 * mask.sum())
    chosen = mask.nonzero()[covariances(logprobs, advantages, mask).topk(number).indices]
    gap = (leaf - old)[chosen[:, 0], chosen[:, 1]]
    want = 0.5 * gap.abs().sum() / mask.sum()
    torch.testing.assert_close(penalty, want)
    torch.testing.assert_close(*(torch.autograd.grad(each, leaf, retain_graph=True)[0] for each in (penalty, want)))
    torch.testing.assert_close(
        kl_cov_penalty(leaf, old, advantages, mask=mask, share=0.05, coef=0.5, normalizer=1.0), want * mask.sum()
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: top_entropy_mask(x, 0.0), "share: expected more than 0.0"),
        (lambda x: top_entropy_mask(x, 1.5), "share: expected .* at most 1.0, got 1.5"),
        (lambda x: top_entropy_mask(x, 0.5, mask=torch.ones(3, dtype=torch.bool)), "mask: expected shape"),
        (lambda x: clip_cov_mask(x, x, x[0]), "advantages: expected shape"),
        (lambda x: clip_cov_mask(x, x[0], x), "old_logprobs: expected shape"),
        (lambda x: clip_cov_mask(x, x, x, cov_low=6.0), "cov_low: expected at most cov_high 5.0, got 6.0"),
        (lambda x: kl_cov_penalty(x, x, x, share=2.0), "share: expected .* at most 1.0, got 2.0"),
        (lambda x: kl_cov_penalty(x, x[0], x), "old_logprobs: expected shape"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))
