"""Every differentiable op has a first derivative in reverse mode, and raises for every other derivative and transform."""

import functools

import fuzz_ops
import pytest
import torch
from contract import BACKENDS
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from mgrpo_kernels import (
    group_advantages,
    grpo_loss,
    iqr_filter,
    linear_policy_loss,
    linear_token_stats,
    policy_loss,
    token_stats_from_logits,
    trajectory_entropy,
)

LABELS, ADVANTAGES = torch.tensor([[0, 4], [2, 1]]), torch.tensor([1.0, -1.0])
KEPT = torch.tensor([[[0, 1], [4, -1]], [[3, 2], [1, 4]]])
WEIGHT, OLD = torch.linspace(-1, 1, 30).view(5, 6), torch.full((2, 2), -0.7)

# op -> (a scalar function of one tensor and a backend, the shape of that tensor)
OPS = {
    "token_stats log-prob": (
        lambda x, backend: token_stats_from_logits(x, LABELS, stats=("logprob",), backend=backend).logprob.sum(),
        (2, 2, 5),
    ),
    "token_stats entropy": (
        lambda x, backend: token_stats_from_logits(x, None, stats=("entropy",), backend=backend).entropy.sum(),
        (2, 2, 5),
    ),
    "linear_token_stats of hidden": (
        lambda x, backend: linear_token_stats(x, WEIGHT, LABELS, backend=backend).entropy.sum(),
        (2, 2, 6),
    ),
    "linear_token_stats of the weight": (
        lambda x, backend: linear_token_stats(torch.ones(2, 2, 6), x, LABELS, backend=backend).logprob.sum(),
        (5, 6),
    ),
    "linear_token_stats of kept sets": (
        lambda x, backend: linear_token_stats(x, WEIGHT, LABELS, kept=KEPT, backend=backend).logprob.sum(),
        (2, 2, 6),
    ),
    "policy_loss": (lambda x, backend: policy_loss(x, OLD, ADVANTAGES, backend=backend).loss, (2, 2)),
    "policy_loss of the entropy": (
        lambda x, backend: (
            policy_loss(torch.zeros(2, 2), OLD, ADVANTAGES, entropy=x, entropy_coef=0.5, backend=backend).loss
        ),
        (2, 2),
    ),
    "grpo_loss": (lambda x, backend: grpo_loss(x, OLD, ADVANTAGES, 2, backend=backend).loss, (2, 2)),
    "linear_policy_loss of hidden": (
        lambda x, backend: linear_policy_loss(x, WEIGHT, LABELS, OLD, ADVANTAGES, backend=backend).loss,
        (2, 2, 6),
    ),
    "linear_policy_loss of the weight": (
        lambda x, backend: linear_policy_loss(torch.ones(2, 2, 6), x, LABELS, OLD, ADVANTAGES, backend=backend).loss,
        (5, 6),
    ),
    "linear_policy_loss, composed": (
        lambda x, backend: (
            linear_policy_loss(x, WEIGHT, LABELS, OLD, ADVANTAGES, importance_level="sequence", backend=backend).loss
        ),
        (2, 2, 6),
    ),
}


@pytest.fixture(params=[(op, backend) for op in OPS for backend in BACKENDS], ids=lambda param: ", ".join(param))
def case(request):
    """Return the function, on one backend, and a tensor to call it with."""
    op, backend = request.param
    function, shape = OPS[op]
    return functools.partial(function, backend=backend), torch.randn(shape)


def test_a_gradient_penalty_raises(case):
    function, x = case
    x.requires_grad_()
    value = function(x)
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(function(x), x)[0])  # itself it is right
    with pytest.raises(RuntimeError, match="cannot be differentiated: expected a first derivative only, got a second"):
        torch.autograd.grad(value + gradient.square().sum(), x)


def test_a_gradient_penalty_raises_without_retaining_the_graph(case):
    function, x = case
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(function(x), x, create_graph=True, retain_graph=False)
    with pytest.raises(RuntimeError, match="expected a first derivative only"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_raises(case, requires_grad):
    function, x = case
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.requires_grad_(requires_grad), torch.ones_like(x))
        with pytest.raises(
            (RuntimeError, NotImplementedError), match="expected reverse-mode|to use it with forward mode AD"
        ):
            function(dual)
        function(x.detach())  # without a tangent it runs there too


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "grad of grad": lambda f, x: torch.func.grad(lambda y: torch.func.grad(f)(y).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, x])),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(f))(torch.stack([x, x])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_functorch_transform_raises(case, transform):
    with pytest.raises(
        RuntimeError, match=r"expected a call outside of torch.func's transforms .* Use torch.autograd.grad"
    ):
        TRANSFORMS[transform](*case)


def test_a_hessian_by_autograd_raises(case):
    with pytest.raises(RuntimeError, match="expected a first derivative only"):
        torch.autograd.functional.hessian(*case)


def test_several_gradients_in_one_backward_pass(case):
    function, x = case
    value = function(x.requires_grad_())
    (one,) = torch.autograd.grad(value, x, retain_graph=True)
    (both,) = torch.autograd.grad(value, x, torch.tensor([1.0, -2.0]), is_grads_batched=True)
    torch.testing.assert_close(both, torch.stack([one, -2 * one]))


def test_checkpointing_gives_the_same_gradient(case):
    function, x = case
    x.requires_grad_()
    (wanted,) = torch.autograd.grad(function(x), x)
    (got,) = torch.autograd.grad(checkpoint(function, x, use_reentrant=False), x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_a_directly_called_fused_loss_without_an_anchor_refuses_a_graph():
    with fuzz_ops.recorded() as calls:
        hidden = torch.ones(2, 2, 6, requires_grad=True)
        linear_policy_loss(hidden, WEIGHT, LABELS, OLD, ADVANTAGES, backend="native")
    (call,) = (call for call in calls if call.name == "mgrpo_kernels.linear_policy_loss.default")
    *call.args, anchor = call.args
    assert anchor.numel() == 0
    call.args.append(None)
    loss, *_ = call()
    torch.autograd.grad(loss, call.args[0], retain_graph=True)
    with pytest.raises(RuntimeError, match="expected an anchor with create_graph=True, got None"):
        torch.autograd.grad(loss, call.args[0], create_graph=True)


def test_the_anchor_keeps_no_input_in_memory():
    from mgrpo_kernels.ops._autograd import anchor

    hidden, weight = torch.ones(1000, 64, requires_grad=True) * 2, torch.ones(50, 64)
    empty = anchor(hidden, weight, None)
    assert empty.numel() == 0
    assert empty.untyped_storage().nbytes() == 0
    assert empty.requires_grad
    assert anchor(weight, None) is None


# Trajectory entropy is made of PyTorch's own functions: what they support, it does.


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 1, 4], dtype=torch.int32)])
def test_trajectory_entropy_under_transforms(cu_seqlens):
    x = torch.rand(2, 2) if cu_seqlens is None else torch.rand(4)
    x.requires_grad_()

    def function(values):
        return trajectory_entropy(values, cu_seqlens=cu_seqlens).square().sum()

    (wanted,) = torch.autograd.grad(function(x), x)
    x = x.detach()
    torch.testing.assert_close(torch.func.grad(function)(x), wanted)
    torch.testing.assert_close(
        torch.vmap(function)(torch.stack([x, 2 * x])), torch.stack([function(x), function(2 * x)])
    )
    if cu_seqlens is None:
        _, tangent = torch.func.jvp(function, (x,), (torch.ones_like(x),))
        torch.testing.assert_close(tangent, wanted.sum())
        return
    with pytest.raises((RuntimeError, NotImplementedError), match="segment_reduce"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match="_segment_reduce_backward is not implemented"):
        torch.func.grad(lambda y: torch.func.grad(function)(y).sum())(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ops_without_a_gradient_return_none(backend):
    x = torch.rand(4, requires_grad=True)
    assert not group_advantages(x, 2, backend=backend).requires_grad
    assert not any(each.requires_grad for each in iqr_filter(x, 2, backend=backend))
