"""Policy losses of log-probs that are finite, but whose ratios overflow or underflow: a term of 0 stays 0, and nothing becomes NaN."""

import itertools

import pytest
import torch
from contract import each_backend

from mgrpo_kernels import policy_loss
from mgrpo_kernels.ops.policy_loss import OP
from mgrpo_kernels.ops.policy_loss.specs import LOSS_TYPES


@each_backend(OP)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_kl_of_zero_stays_so_where_its_ratio_overflows(backend, level, estimator):
    """e^199 is infinite in float32; the clipped surrogate and the KL divergence of 0 are not."""
    logprobs = torch.full((3, 1), -1.0, requires_grad=True)
    loss, metrics = policy_loss(
        logprobs,
        torch.full((3, 1), -200.0),
        torch.tensor([1.0, 0.5, 0.0]),
        ref_logprobs=torch.full((3, 1), -1.0),
        importance_level=level,
        kl_coef=0.1,
        kl_estimator=estimator,
        kl_bias_correction=True,
        backend=backend,
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert loss.item() == pytest.approx(-1.2 * 1.5 / 3)
    assert metrics["kl_sum"] == 0
    assert metrics["ratio_max"] == torch.inf
    if estimator == "k1":  # whose derivative is the ratio
        assert (gradient == torch.inf).all()
    else:
        assert (gradient == 0).all()


@each_backend(OP)
def test_an_infinite_kl_has_no_part_in_the_loss_where_its_ratio_is_zero(backend):
    logprobs = torch.full((1, 1), -200.0, requires_grad=True)
    loss, metrics = policy_loss(
        logprobs,
        torch.full((1, 1), -1.0),
        torch.tensor([-1.0]),
        ref_logprobs=torch.full((1, 1), -1.0),
        kl_coef=0.1,
        kl_bias_correction=True,
        backend=backend,
    )
    assert loss.item() == pytest.approx(0.8)
    assert metrics["kl_sum"] == 0
    assert torch.autograd.grad(loss, logprobs)[0].item() == 0


@each_backend(OP)
@pytest.mark.parametrize(
    ("loss_type", "more"),
    [
        *((name, {}) for name in LOSS_TYPES if name not in ("bnpo", "dr_grpo", "luspo")),  # whose surrogate is dapo's
        ("dapo", {"clip_delta": 3.0}),
        ("grpo", {"importance_level": "sequence"}),
        ("dapo", {"behaviour_mode": "token_mask"}),
        ("dapo", {"behaviour_mode": "sequence_truncate"}),
        ("dapo", {"behaviour_mode": "geometric_mask"}),
    ],
    ids=str,
)
def test_no_nan_comes_of_extreme_log_probs(backend, loss_type, more):
    """Each combination of -1 and -200 in a sequence of its own: the loss of a negative advantage alone is infinite, and only without a bound."""
    grid = itertools.product([-1.0, -200.0], [-1.0, -200.0], [-1.0, -200.0], [1.0, -1.0, 0.0])
    logprobs, old, behaviour, advantages = torch.tensor(list(grid)).T.contiguous()
    logprobs.requires_grad_()
    loss, metrics = policy_loss(
        logprobs,
        old,
        advantages,
        cu_seqlens=torch.arange(len(old) + 1),
        loss_type=loss_type,
        behaviour_logprobs=behaviour,
        ref_logprobs=logprobs.detach() - 1.0,
        kl_coef=0.1,
        backend=backend,
        **more,
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    for name, value in {"loss": loss, "gradient": gradient, **metrics}.items():
        assert not value.isnan().any(), name
    unbounded = loss_type in ("grpo", "dapo", "gmpo") and "clip_delta" not in more
    overflows = (logprobs - old > 88) & (advantages < 0)
    assert loss.isinf() == gradient.isinf().any() == unbounded
    assert gradient[~overflows].isfinite().all()
