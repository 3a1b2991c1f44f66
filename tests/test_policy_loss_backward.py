"""The backward pass of the policy loss on a CPU: it scales the gradient of the forward pass in place where nothing reads that again."""

import pytest
import torch
from contract import each_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mgrpo_kernels import policy_loss
from mgrpo_kernels.ops.policy_loss import OP, op

B, L = 6, 4099


class Names(TorchDispatchMode):
    """The operators that are called inside."""

    seen = ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += (str(function),)
        return function(*args, **(kwargs or {}))


def loss_of(leaf, backend, **options):
    generator = torch.Generator().manual_seed(0)
    old = leaf.detach().float() + 0.2 * torch.randn(B, L, generator=generator)
    mask = torch.rand(B, L, generator=generator) > 0.3
    return policy_loss(
        leaf, old, torch.randn(B, generator=generator), mask=mask, loss_type="dapo", backend=backend, **options
    ).loss


def leaf_of(dtype=torch.float32):
    return torch.randn(B, L, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def gradients_of_tokens(function):
    """Return the largest allocation, in bytes, that `function` makes."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    return max((event.self_cpu_memory_usage for event in profile.events()), default=0)


@each_backend(OP)
def test_the_only_backward_pass_allocates_no_second_gradient(backend):
    leaf = leaf_of()
    loss = loss_of(leaf, backend)
    assert gradients_of_tokens(lambda: torch.autograd.grad(loss, leaf, torch.tensor(0.5))) < 4 * B * L
    loss = loss_of(leaf, backend)
    kept = gradients_of_tokens(lambda: torch.autograd.grad(loss, leaf, torch.tensor(0.5), retain_graph=True))
    assert kept >= 4 * B * L  # what the first line would see of a second tensor


@each_backend(OP)
def test_a_graph_that_is_kept_gives_the_same_gradient_every_time(backend):
    leaf = leaf_of()
    (want,) = torch.autograd.grad(loss_of(leaf, backend), leaf)
    loss = loss_of(leaf, backend)
    for factor in (1.0, -3.0, 1.0):
        (got,) = torch.autograd.grad(loss, leaf, torch.tensor(factor), retain_graph=True)
        torch.testing.assert_close(got, factor * want)
        got.fill_(7.0)
    batched = torch.autograd.grad(loss, leaf, torch.tensor([1.0, 2.0]), is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(batched, torch.stack([want, 2 * want]))
    loss.backward()
    assert torch.equal(leaf.grad, want)
    loss_of(leaf, backend).backward()
    assert torch.equal(leaf.grad, 2 * want)


@each_backend(OP)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_gradient_is_scaled_in_float32(backend, dtype):
    """The loss scale of mixed precision comes before the rounding to 16 bits, where small gradients would be lost."""
    leaf = leaf_of(dtype)
    wide = leaf.detach().float().requires_grad_()
    (want,) = torch.autograd.grad(loss_of(wide, backend, normalizer=1e9), wide, torch.tensor(65536.0))
    (got,) = torch.autograd.grad(loss_of(leaf, backend, normalizer=1e9), leaf, torch.tensor(65536.0))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-7)


@each_backend(OP)
def test_log_probs_and_entropies_get_their_gradients_together(backend):
    leaf, entropy = leaf_of(), leaf_of()
    (want,) = torch.autograd.grad(loss_of(leaf, backend), leaf)
    loss = loss_of(leaf, backend, entropy=entropy, entropy_coef=0.5)
    got, of_entropy = torch.autograd.grad(loss, (leaf, entropy), torch.tensor(2.0))
    torch.testing.assert_close(got, 2 * want)
    counted = of_entropy != 0
    torch.testing.assert_close(of_entropy[counted], (-1.0 / counted.sum()).expand(int(counted.sum())))
    assert torch.equal(got != 0, counted & (want != 0))


@each_backend(OP)
def test_a_dispatch_mode_sees_the_backward_pass_as_one_operator(backend):
    leaf = leaf_of()
    loss = loss_of(leaf, backend)
    with Names() as names:
        torch.autograd.grad(loss, leaf)
    assert "mgrpo_kernels.policy_loss_backward.default" in names.seen


@pytest.fixture
def ops_called(monkeypatch):
    """The names of the backends that the custom op was called with."""
    seen = []
    real = op.policy_loss_op
    monkeypatch.setattr(op, "policy_loss_op", lambda *args: (seen.append(args[-1]), real(*args))[1])
    return seen


def test_a_native_loss_of_plain_tensors_is_called_directly_with_the_bits_of_the_op(ops_called, monkeypatch):
    leaf, entropy = leaf_of(), leaf_of()
    results = []
    for direct in (True, False):
        if not direct:
            monkeypatch.setattr(op.direct, "applies", lambda *_: False)
        loss = loss_of(leaf, "native", entropy=entropy, entropy_coef=0.5)
        results.append([loss.detach(), *torch.autograd.grad(loss, (leaf, entropy))])
        assert ops_called == ([] if direct else ["native"])
    assert all(map(torch.equal, *results))


def test_an_entropy_alone_has_a_gradient_native():
    leaf, entropy = leaf_of().detach(), leaf_of()
    loss = loss_of(leaf, "native", entropy=entropy, entropy_coef=0.5)
    assert torch.autograd.grad(loss, entropy)[0].sum() == pytest.approx(-0.5)
    assert not loss_of(leaf, "native", entropy=entropy.detach(), entropy_coef=0.5).requires_grad


def test_what_is_not_plain_goes_through_the_op_native(ops_called):
    """Dispatch modes, subclasses and transforms see the op, or its error."""

    class Plain(torch.Tensor):
        pass

    leaf = leaf_of()
    mode = FakeTensorMode()
    with torch.overrides.BaseTorchFunctionMode():
        loss_of(leaf, "native")
    assert ops_called == []
    with Names():
        loss_of(leaf, "native")
    assert ops_called == ["native"]
    loss_of(leaf.detach().as_subclass(Plain), "native")
    assert ops_called == ["native"] * 2
    fake = mode.from_tensor(torch.zeros(B, L))
    with mode:
        assert policy_loss(fake, None, torch.zeros(B), backend="native").loss.shape == ()
    assert ops_called == ["native"] * 3
    with pytest.raises(RuntimeError, match="outside of torch.func's transforms"):
        torch.func.grad(lambda x: policy_loss(x, None, torch.zeros(B), backend="native").loss)(leaf.detach())
